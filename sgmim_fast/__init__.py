"""SG-MIM: masked image modelling guided by a structure map, built for speed.

Names are imported on first use, so that ``sgmim --help`` and the processes that render scenes need no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgmim_fast.backbones import create_backbone
    from sgmim_fast.config import BackboneConfig, ModelConfig
    from sgmim_fast.errors import UserError
    from sgmim_fast.models.backbone import Backbone
    from sgmim_fast.models.registry import create_model
    from sgmim_fast.weights import load_weights, save_weights

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "BackboneConfig",
    "ModelConfig",
    "UserError",
    "create_backbone",
    "create_model",
    "load_weights",
    "save_weights",
]

_HOMES = {
    "Backbone": "sgmim_fast.models.backbone",
    "BackboneConfig": "sgmim_fast.config",
    "ModelConfig": "sgmim_fast.config",
    "UserError": "sgmim_fast.errors",
    "create_backbone": "sgmim_fast.backbones",
    "create_model": "sgmim_fast.models.registry",
    "load_weights": "sgmim_fast.weights",
    "save_weights": "sgmim_fast.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
