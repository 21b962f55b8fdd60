"""Encoders, structured-knowledge encoder, relational guidance and the pre-training model."""
