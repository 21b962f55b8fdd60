"""What libraries say when they are imported, and is for nobody who reads a run's output."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_torchao_complaints() -> Iterator[None]:
    """While torchao is imported, here or by transformers: it registers its types in a way that PyTorch complains of."""
    complaints = logging.getLogger("torch.utils._pytree")
    before, complaints.disabled = complaints.disabled, True
    try:
        yield
    finally:
        complaints.disabled = before
