"""The model: checkpoints, fine-tuning strategies, training and pre-training."""
