"""The judgement: runs and their scores, one rule of comparison, leaks, published numbers."""
