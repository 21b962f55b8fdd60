"""Packing pairs into shards, for ``sgmim shard``."""
