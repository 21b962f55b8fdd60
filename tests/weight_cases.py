"""What the tests of weights share: tiny models, official-looking files, refusals."""

import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from sgmim_fast import ModelConfig, UserError, create_model
from sgmim_fast.models.sgmim import SGMIM
from sgmim_fast.weights import load_weights

ENCODERS = ("swin", "swinv2", "vit")


def tiny(encoder: str, **fields: Any) -> ModelConfig:
    """A few thousand parameters a block; 64 px, so that Swin has shifted and unshifted windows."""
    shape: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4), "window_size": 4}
    if encoder == "vit":
        shape = {"embed_dim": 32, "depths": (3,), "num_heads": (4,), "layer_scale_init": 0.1}
    return ModelConfig(encoder=encoder, **{"image_size": 64, **shape, **fields})  # type: ignore[arg-type]


def randomised(config: ModelConfig, seed: int = 1, dtype: torch.dtype = torch.float32) -> SGMIM:
    """A model with no two parameters alike: initial ones are zeros and ones in many places."""
    model = create_model(config, backend="torch").to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + float(parameter.dim() == 1))
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], keys: Any = None) -> bool:
    return all(torch.equal(one[key], other[key]) for key in (one if keys is None else keys))


def refuses(act: Callable[[], Any], *said: str) -> str:
    """The one line of the error that ``act`` ends in, which says all of ``said``."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message
    return message


def refuses_to_load(model: nn.Module, source: Any, *said: str, strict: bool = True) -> str:
    before = snapshot(model)
    message = refuses(lambda: load_weights(model, source, strict=strict), *said)
    assert same(before, model.state_dict())
    return message


class CfgNode(dict[str, Any]):
    """As yacs pickles its nodes, name included: a dict with settings in its __dict__."""

    __module__ = "yacs.config"

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.__dict__.update(
            {"__immutable__": True, "__deprecated_keys__": {"OLD"}, "__renamed_keys__": {}, "__new_allowed__": False}
        )


def write_official(path: Path, state: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """A checkpoint as the authors' training loop saves it, with yacs configuration, optimizer and scheduler."""
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.0}], lr=1e-3)
    weight.sum().backward()
    optimizer.step()
    scheduler = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-5, warmup_t=2, t_in_epochs=False)
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        content = {
            "model": dict(state),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": scheduler.state_dict(),
            "max_accuracy": 0.0,
            "epoch": 99,
            "config": CfgNode({"MODEL": {"SWIN": {"DEPTHS": [2, 2], "APE": False, "QK_SCALE": None}}, "TAG": "x"}),
        }
        torch.save(content, path, **options)
    assert b"yacs.config" in path.read_bytes()
    assert "yacs.config" not in sys.modules
    return path
