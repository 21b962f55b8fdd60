"""Heads: from a backbone's maps to depth or to logits of the image's size."""
