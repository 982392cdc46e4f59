"""tuneformer: how to fine-tune Geneformer, and on what cells. Helper package of the numbered notebooks."""

import gc
import warnings

__version__ = "0.3.0"

# transformers and datasets load tqdm, which warns in every notebook that ipywidgets (left out on purpose) is missing
warnings.filterwarnings("ignore", message="IProgress not found")

# Importing torch and transformers makes a million objects that stay. To look for garbage among them after every 700 new
# ones (Python's default is 700, 10, 10) takes a fifth of the seconds in which a job starts.
gc.set_threshold(100_000, 20, 100)
