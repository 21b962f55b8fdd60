"""The training engine: arguments, optimizer, loop, checkpoints, metrics. DeepSpeed is imported from here on up."""
