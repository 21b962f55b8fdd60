"""SG-MIM: masked image modelling guided by a structure map, built for speed."""

from sgmim_fast.config import ModelConfig
from sgmim_fast.errors import UserError
from sgmim_fast.models.registry import create_model
from sgmim_fast.weights import load_weights, save_weights

__version__ = "0.1.0"
__all__ = ["ModelConfig", "UserError", "create_model", "load_weights", "save_weights"]
