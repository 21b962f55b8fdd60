"""Pairs of image and structure map: making, checking, reading and serving them."""
