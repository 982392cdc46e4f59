"""From tokens to a fine-tuned model: strategies, losses, training, baselines, pre-training, genes, compression."""
