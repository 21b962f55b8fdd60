"""Parts of ``benchmarks.replication``: arms, sizes, stages, statistics and pictures of rows."""
