"""Procedural 3-D scenes with exact depth and labels: data for those who have none at hand."""
