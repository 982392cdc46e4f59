"""Cells to tokens: gene vocabulary and rank-value encoding."""

import warnings

# datasets loads tqdm, which warns in every notebook that ipywidgets (left out on purpose) is missing
warnings.filterwarnings("ignore", message="IProgress not found")
