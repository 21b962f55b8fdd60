"""Packages named apex for tests: one with the interface of NVIDIA's, and PyPI's, which is something else."""

import sys
from pathlib import Path

NVIDIA = {
    "__init__.py": "",
    # Like NVIDIA's: the count of steps lies in the groups, and a missing CUDA extension shows when it is made.
    "optimizers/__init__.py": """
import torch

class FusedAdam(torch.optim.Optimizer):
    extensions = True

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True):
        if not self.extensions:
            raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")
        assert adam_w_mode and bias_correction and not amsgrad
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                mean, square = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
                p -= group["lr"] * (mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p)
""",
    "normalization/__init__.py": """
import torch

class FusedLayerNorm(torch.nn.Module):
    extensions = True

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        if not self.extensions:
            raise ImportError("No module named 'fused_layer_norm_cuda'")
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape, self.eps, self.calls = shape, eps, 0
        self.weight = torch.nn.Parameter(torch.ones(shape))
        self.bias = torch.nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        self.calls += 1
        return torch.nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
""",
}
PYPI = {"__init__.py": "raise SystemExit('the other apex has run')", "lib/__init__.py": ""}


def write(folder: Path, files: dict[str, str]) -> Path:
    """Put a package named apex into ``folder``; returns the folder, which belongs on sys.path."""
    for name, content in files.items():
        path = folder / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def forget() -> None:
    """Let the next import of apex look for it anew."""
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]
