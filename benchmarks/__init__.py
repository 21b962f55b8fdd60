"""Speed and memory, measured and recorded. Needs torch, triton, numpy and timm alone."""
