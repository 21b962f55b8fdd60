"""Data of dense tasks: an image with a depth, or with a class, for every pixel."""
