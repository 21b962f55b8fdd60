"""What every launcher shares: whether kernels can run, on which device, and how blocks are chosen.

Choices are pure functions of shapes and dtypes, so they can be tested, and compiled ahead of time, without a GPU.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True where TRITON_INTERPRET=1 was set before Triton was imported: kernels then run on CPU tensors, slowly."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (8, 0)  # compute capability: the first with bf16 matrix instructions


def objection(x: Tensor) -> str | None:
    """Why kernels cannot run on tensors like ``x``; None if they can."""
    if x.device.type == "cuda":
        if INTERPRETED:
            return "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors only; unset it"
        found = torch.cuda.get_device_capability(x.device)
        if found < OLDEST:
            return f"kernels need compute capability {_version(OLDEST)} or newer; this GPU has {_version(found)}"
    elif x.device.type == "cpu" and not INTERPRETED:
        return "it needs tensors on a GPU, and one is on the CPU (TRITON_INTERPRET=1 runs kernels there, slowly)"
    elif x.device.type not in ("cpu", "meta"):  # meta tensors only ask for shapes
        return f"kernels are for CUDA, not for {x.device.type}"
    known = (*DTYPES, torch.float64) if INTERPRETED else DTYPES
    if (x.is_floating_point() or x.is_complex()) and x.dtype not in known:
        return f"kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    return None


def _version(parts: tuple[int, int]) -> str:
    return f"{parts[0]}.{parts[1]}"


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of ``x`` the current one: Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """How products of two blocks of ``dtype`` are taken: as exact as torch's own are set to be.

    float32 is exact unless ``torch.set_float32_matmul_precision`` allows TF32; 16-bit types are exact anyway.
    """
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def block(size: int, least: int = 16) -> int:
    """Smallest power of two that holds ``size``, at least ``least`` (the narrowest block of a matrix product)."""
    return max(least, triton.next_power_of_2(size))
