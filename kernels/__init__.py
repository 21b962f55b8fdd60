"""Triton kernels, imported as ``sgmim_fast.kernels``.

Importing this package imports no Triton; each module in it does, so callers import one when they need it.
"""
