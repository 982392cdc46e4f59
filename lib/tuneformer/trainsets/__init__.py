"""Made cells: what a model can be trained on instead of, or beside, single cells."""
