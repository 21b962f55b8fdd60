"""Model, loss and metrics of one task in one place each."""
