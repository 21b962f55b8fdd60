"""Decoding every pair of a data set once, for ``sgmim verify``."""
