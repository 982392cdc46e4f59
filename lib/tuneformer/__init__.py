"""tuneformer: how to fine-tune Geneformer, and on what cells. Helper package of the numbered notebooks."""

__version__ = "0.1.0"
