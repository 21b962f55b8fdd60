"""NVIDIA Apex: found without running it, imported only where it is asked for by name.

The package that PyPI calls apex is another one: it must neither be taken for NVIDIA's nor run.
"""

from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, Literal

from sgmim_fast.errors import UserError, first_line

PARTS = ("optimizers", "normalization")
REMEDY = "build NVIDIA's from github.com/NVIDIA/apex with its CUDA extensions"


def find() -> Literal["nvidia", "other", "missing"]:
    """Whose apex is installed, by the parts it has; nothing of it runs."""
    spec = find_spec("apex")
    if spec is None:
        return "missing"
    folders = list(spec.submodule_search_locations or ())
    return "nvidia" if all(PathFinder.find_spec(f"apex.{part}", folders) for part in PARTS) else "other"


def load(part: str, name: str) -> Any:
    """``apex.<part>.<name>``, for example ``apex.optimizers.FusedAdam``.

    Raises:
        UserError: saying why it cannot be had, to be put after the name of what was asked for.
    """
    found = find()
    if found == "missing":
        raise UserError(f"NVIDIA Apex is not installed; {REMEDY}")
    if found == "other":
        raise UserError(
            f"the apex that is installed is PyPI's package of that name, not NVIDIA's; uninstall it and {REMEDY}"
        )
    try:
        return getattr(import_module(f"apex.{part}"), name)
    except Exception as error:  # whatever a package built for another PyTorch raises
        raise UserError(f"NVIDIA Apex is installed but fails ({first_line(error)}); {REMEDY}") from error
