"""Configuration from recipe, YAML file and command line, in that order; the last word wins.

A YAML file says the same as the options it replaces (``schedule: {epochs: 50}`` is ``--schedule.epochs 50``),
so both go through one parser and meet the same checks.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from sgmim_fast.config import PretrainConfig
from sgmim_fast.errors import UserError
from sgmim_fast.recipes import RECIPES

DESCRIPTION = """Pre-train an encoder by SG-MIM on a folder of image and structure-map pairs.

Start it with a launcher, one process a GPU (or, without GPUs, a CPU rank each):
  deepspeed --num_gpus 2 --module sgmim_fast.pretrain --recipe swin_base_100ep --data DIR --output runs/one
  torchrun --nproc-per-node 2 -m sgmim_fast.pretrain --recipe swin_base_100ep --data DIR --output runs/one
  sgmim pretrain --num-gpus 2 --recipe swin_base_100ep --data DIR --output runs/one

--recipe NAME   start from one of: {recipes}
--config FILE   YAML with any of the options below, nested by their dots
--data PATH     short for --data.path
--loader NAME   short for --data.loader
--compile       short for --train.compile
--profile STEPS short for --monitor.profile-steps
"""

SHORT = {
    "--data": "--data.path",
    "--loader": "--data.loader",
    "--compile": "--train.compile",
    "--no-compile": "--train.no-compile",
    "--profile": "--monitor.profile-steps",
}


def parse_config(argv: Sequence[str]) -> tuple[PretrainConfig, str]:
    """The configuration that ``argv`` (without the program's name) asks for, and the recipe's name.

    Raises:
        UserError: for an unknown recipe, option or YAML key, a value of the wrong type, or an invalid combination.
        SystemExit: after ``--help``.
    """
    outer = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    outer.add_argument("--recipe", default="swin_base_100ep")
    outer.add_argument("--config", type=Path)
    outer.add_argument("--local_rank", "--local-rank", type=int)  # passed by the deepspeed launcher
    known, rest = outer.parse_known_args(list(argv))
    if known.recipe not in RECIPES:
        raise UserError(f"recipe {known.recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    rest = [_expand(word) for word in rest]
    if known.config is not None:
        rest = [*_flatten(_read_mapping(known.config)), *rest]
    return _parse(rest, RECIPES[known.recipe]()), known.recipe


def load_config(path: Path) -> PretrainConfig:
    """The configuration that a run wrote to its ``config.json``."""
    content = dict(_read_mapping(path))
    content.pop("recipe", None)
    return _parse(list(_flatten(content)), PretrainConfig())


def config_to_json(config: PretrainConfig, recipe: str) -> str:
    """What ``load_config`` reads."""
    return json.dumps({"recipe": recipe, **dataclasses.asdict(config)}, indent=2) + "\n"


def _parse(args: list[str], default: PretrainConfig) -> PretrainConfig:
    options = _option_names(default)
    for word in args:
        name = word.split("=")[0].replace("_", "-")
        if name.startswith("--") and name not in options and name != "--help":
            close = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists them all"
            raise UserError(f"option {name} is unknown; {hint}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                PretrainConfig,
                args=args,
                default=default,
                prog="sgmim pretrain",
                description=DESCRIPTION.format(recipes=", ".join(RECIPES)),
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(_first_paragraph(complaint.getvalue())) from None
        raise


def _first_paragraph(box: str) -> str:
    """The message of tyro's framed complaint as one line."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if set(line) <= set("─╰╯")), len(lines))
    return re.sub(r"^Error parsing (\w+: )?", "", " ".join(lines[:end]))


def _option_names(config: Any, prefix: str = "--") -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            names += _option_names(value, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
            if isinstance(value, bool):
                names.append(f"{prefix}no-{name}")
    return names


def _expand(word: str) -> str:
    name, equals, value = word.partition("=")
    return SHORT.get(name, name) + equals + value


def _read_mapping(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        line = str(error).replace("\n", " ")
        raise UserError(f"configuration {path} is not YAML: {line}") from error
    if not isinstance(content, dict):
        raise UserError(f"configuration {path} must hold a mapping such as 'schedule: {{epochs: 50}}'")
    return content


def _flatten(content: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    for key, value in content.items():
        name = prefix + str(key).replace("_", "-")
        if isinstance(value, Mapping):
            yield from _flatten(value, name + ".")
        elif isinstance(value, bool):
            yield name if value else f"{prefix}no-{str(key).replace('_', '-')}"
        elif isinstance(value, list):
            yield from (name, *map(str, value))
        else:
            yield from (name, str(value))
