"""tuneformer: how to fine-tune Geneformer, and on what cells. Helper package of the numbered notebooks."""

import warnings

__version__ = "0.2.0"

# transformers and datasets load tqdm, which warns in every notebook that ipywidgets (left out on purpose) is missing
warnings.filterwarnings("ignore", message="IProgress not found")
