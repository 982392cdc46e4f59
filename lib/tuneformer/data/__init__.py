"""Cells: where they come from, quality control, splits, and the simulated demo data set."""
