"""Cells to tokens: gene vocabulary and rank-value encoding."""
