"""What `sgmim` does for commands that are more than a few lines."""
