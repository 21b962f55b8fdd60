"""What DeepSpeed would say, build and import for nothing in a run."""

import logging
import os
import warnings
from contextlib import suppress
from importlib import import_module

import deepspeed


def spare_needless_work() -> None:
    """Call it before the ranks join."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch's collectives by names that torch has begun to rename.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # Only inference uses this op; building it would need a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which it asks for whenever it makes an engine, with nothing in it compiled.

    Its decorator would import all of PyTorch's compiler, on every rank.
    """
    switch = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with suppress(ImportError):
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
