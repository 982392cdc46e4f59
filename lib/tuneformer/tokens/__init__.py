"""From cells with counts to lists of tokens: the genes a model knows, rank-value encoding, the official format."""
