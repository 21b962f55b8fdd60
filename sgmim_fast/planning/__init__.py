"""What a run on many GPUs would take, calculated from one measured GPU (``sgmim plan``, docs/scaling.md)."""
