"""Made cells: what a model is trained on when that is not all single cells as they are."""
