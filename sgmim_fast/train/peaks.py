"""What devices can do at most, which the model FLOPs utilisation is a share of."""

import re
from typing import Literal, NamedTuple

import torch

Precision = Literal["bf16", "tf32", "fp32"]


class Peak(NamedTuple):
    """Dense matrix products of one device in TFLOP/s, none with structured sparsity; None where it cannot do them."""

    bf16: float | None
    """Tensor cores on bfloat16, with fp32 accumulation."""
    tf32: float | None
    """Tensor cores on fp32 rounded to TF32."""
    fp32: float
    """CUDA cores, no tensor cores."""


# From NVIDIA's data sheet of each product, and for GeForce from the whitepapers of the GA102 and Ada architectures:
# half of the figure where only that with sparsity is given. Names are those of `torch.cuda.get_device_name`, matched as
# a whole: A10G, "RTX 4090 Laptop GPU" or a MIG slice of an A100 are other devices.
PEAKS = {
    r"A100-(SXM4|PCIE|PCIe)-[48]0GB|A100 80GB PCIe": Peak(312.0, 156.0, 19.5),
    r"H100 80GB HBM3|H100 SXM\S*": Peak(989.5, 494.5, 67.0),
    r"H100 PCIe": Peak(756.5, 378.0, 51.0),
    r"H200": Peak(989.5, 494.5, 67.0),
    r"B200": Peak(2250.0, 1125.0, 75.0),
    r"L40S": Peak(362.0, 183.0, 91.6),
    r"A10": Peak(125.0, 62.5, 31.2),
    r"GeForce RTX 4090": Peak(165.2, 82.6, 82.6),
    r"GeForce RTX 3090": Peak(71.0, 35.6, 35.6),
    r"V100-SXM2-(16|32)GB\S*": Peak(None, None, 15.7),
    r"V100-PCIE-(16|32)GB": Peak(None, None, 14.0),
}


def peak_tflops(name: str, precision: Precision) -> float | None:
    """Dense peak of the device of that name in TFLOP/s; None if it is not known, or cannot compute in ``precision``."""
    model = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    found = next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, model)), None)
    return None if found is None else getattr(found, precision)


def device_peak_tflops(device: torch.device, precision: Literal["fp32", "bf16"], told: float | None) -> float | None:
    """Peak of a run's device in TFLOP/s.

    Args:
        device: this rank's.
        precision: of weights and activations. Products of fp32 are TF32's where
            ``torch.set_float32_matmul_precision`` allows that, which PyTorch does not unless told.
        told: ``monitor.peak_tflops``, which goes before what is known.
    """
    if told is not None or device.type != "cuda":
        return told
    exact = torch.get_float32_matmul_precision() == "highest"
    products: Precision = "bf16" if precision == "bf16" else "fp32" if exact else "tf32"
    return peak_tflops(torch.cuda.get_device_name(device), products)
