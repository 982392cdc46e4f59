"""The model: checkpoints, fine-tuning strategies, training and pre-training."""

import warnings

# transformers loads tqdm, which warns in every notebook that ipywidgets (left out on purpose) is missing
warnings.filterwarnings("ignore", message="IProgress not found")
