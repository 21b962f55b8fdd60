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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import tyro
import yaml

from sgmim_fast.config import RunConfig
from sgmim_fast.errors import UserError

Config = TypeVar("Config", bound=RunConfig)
_FIRST_KIND = "pretrain"
"""Of runs that were written when there was no other."""


@dataclass(frozen=True, kw_only=True)
class Program(Generic[Config]):
    """A kind of run as the command line knows it."""

    kind: str
    """As ``Job.kind``; written to ``config.json``."""
    command: str
    """What people type."""
    description: str
    """What ``--help`` begins with; ``{recipes}`` becomes their names."""
    recipes: Mapping[str, Callable[[], Config]]
    recipe: str
    """The one that is meant where none is named."""
    short: Mapping[str, str]
    """Options by a shorter name."""


def parse_config(argv: Sequence[str], program: Program[Config]) -> tuple[Config, str]:
    """The configuration that ``argv`` (without the program's name) asks for, and the recipe's name.

    Raises:
        UserError: for an unknown recipe, option or YAML key, a value of the wrong type, or an invalid combination.
        SystemExit: after ``--help``.
    """
    outer = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    outer.add_argument("--recipe", default=program.recipe)
    outer.add_argument("--config", type=Path)
    outer.add_argument("--local_rank", "--local-rank", type=int)  # passed by the deepspeed launcher
    known, rest = outer.parse_known_args(list(argv))
    if known.recipe not in program.recipes:
        raise UserError(f"recipe {known.recipe!r} is unknown; choose one of {', '.join(program.recipes)}")
    rest = [_expand(word, program.short) for word in rest]
    if known.config is not None:
        rest = [*_flatten(_read_mapping(known.config)), *rest]
    return _parse(rest, program, program.recipes[known.recipe]()), known.recipe


def load_config(path: Path, program: Program[Config]) -> Config:
    """The configuration that a run of ``program``'s kind wrote to its ``config.json``.

    Raises:
        UserError: if it cannot be read, or is one of another kind of run.
    """
    content = dict(_read_mapping(path))
    kind = content.pop("kind", _FIRST_KIND)
    if kind != program.kind:
        raise UserError(f"{path}: belongs to a {kind} run; name one of {program.command}")
    content.pop("recipe", None)
    return _parse(list(_flatten(content)), program, type(program.recipes[program.recipe]())())


def changed_config(config: Config, words: Sequence[str], program: Program[Config]) -> Config:
    """``config`` with the options ``words`` in the place of its own.

    Raises:
        UserError: as ``parse_config``.
    """
    return _parse([_expand(word, program.short) for word in words], program, config)


def kind_of_run(path: Path) -> str:
    """``Job.kind`` of the run that wrote a ``config.json``."""
    return str(_read_mapping(path).get("kind", _FIRST_KIND))


def config_to_json(config: RunConfig, recipe: str, kind: str) -> str:
    """What ``load_config`` reads."""
    return json.dumps({"kind": kind, "recipe": recipe, **dataclasses.asdict(config)}, indent=2) + "\n"


def _parse(args: list[str], program: Program[Config], default: Config) -> Config:
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
                type(default),
                args=args,
                default=default,
                prog=program.command,
                description=program.description.format(recipes=", ".join(program.recipes)),
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


def _expand(word: str, short: Mapping[str, str]) -> str:
    name, equals, value = word.partition("=")
    return short.get(name, name) + equals + value


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
