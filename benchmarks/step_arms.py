"""The arms that a training step is measured with: one implementation each, all from the same weights and batch."""

import argparse
import ast
import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.clocks import synchronize
from benchmarks.optimizers import Update
from sgmim_fast.attention import ATTENTIONS
from sgmim_fast.config import Float8, ModelConfig
from sgmim_fast.config.checks import known_fields
from sgmim_fast.errors import UserError
from sgmim_fast.masking import STREAM_MASK, draw_cell_mask, mask_indices, sample_rng
from sgmim_fast.models.float8 import check_float8, use_float8
from sgmim_fast.models.registry import create_model
from sgmim_fast.models.sgmim import SGMIM

PRECISIONS = ("fp32", "bf16", "autocast")
RATIO = 0.6
WARM_UP = 3  # steps
WORDS = ("compile", "autotune", "graphs")
MODES = {
    frozenset(): "default",
    frozenset({"autotune"}): "max-autotune-no-cudagraphs",
    frozenset({"graphs"}): "reduce-overhead",
    frozenset({"autotune", "graphs"}): "max-autotune",
}
"""Of torch.compile, by what is added to a backend's name beside "compile", which each of them implies."""
FLOAT8: dict[str, Float8] = {
    "float8": "tensorwise",
    "float8_rowwise": "rowwise",
    "float8_rowwise_with_gw_hp": "rowwise_with_gw_hp",
}
"""Recipes of ``use_float8`` by the word that is added to a backend's name."""
PEER = "timm"
"""The outside peer's name among the backends."""
Batch = tuple[Tensor, ...]
"""Arguments of ``SGMIM.forward``."""


@dataclass(frozen=True)
class Variant:
    """One implementation of the step."""

    name: str
    backend: str
    attention: str
    compiled: bool
    mode: str = "default"
    """Of torch.compile, where compiled."""
    float8: Float8 = "off"

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """From words as in "triton+compile".

        Raises:
            UserError: for a word that is unknown.
        """
        backend, *more = name.split("+")
        attention = next((word for word in more if word in ATTENTIONS), "auto")
        float8 = next((FLOAT8[word] for word in more if word in FLOAT8), "off")
        if unknown := [word for word in more if word not in (*ATTENTIONS, *WORDS, *FLOAT8)]:
            raise UserError(
                f"{unknown[0]!r} in {name!r} is unknown; add +compile, +autotune, +graphs, +sdpa, +xformers or "
                f"{', '.join(f'+{word}' for word in FLOAT8)} to a backend"
            )
        asked = frozenset(word for word in more if word in WORDS)
        mode = MODES[asked - {"compile"}] if asked else "default"
        return cls(name, backend, attention, bool(asked), mode, float8)

    def row(self) -> dict[str, Any]:
        """What rows tell of it."""
        return {
            "arm": self.name,
            "backend": self.backend,
            "attention": self.attention,
            "compiled": self.compiled,
            "compile_mode": self.mode if self.compiled else None,
            "float8": self.float8,
        }

    def check(self, precision: str, device: torch.device) -> None:
        """Refuse what no arm of ``precision`` on ``device`` can do.

        Raises:
            UserError: with the reason.
        """
        if self.float8 != "off" and precision != "bf16":
            raise UserError(f"arm {self.name!r} is for --precision bf16: what is not FP8 is bf16")
        check_float8(self.float8, device)

    def compile(self, module: nn.Module) -> Any:
        """``module`` as one graph of the shapes it first sees."""
        mode = None if self.mode == "default" else self.mode
        return torch.compile(module, dynamic=False, fullgraph=True, mode=mode)

    @property
    def graphs(self) -> bool:
        """Whether CUDA graphs are asked for."""
        return self.mode in ("reduce-overhead", "max-autotune")


def fields_of(options: argparse.Namespace) -> dict[str, Any]:
    """Those of ``ModelConfig`` that ``--override`` changes."""
    return {name: ast.literal_eval(value) for name, value in (word.split("=", 1) for word in options.override)}


def config_of(model: ModelConfig, options: argparse.Namespace) -> ModelConfig:
    """``model`` with what ``--override`` changes, and without drop path, which would draw other numbers in each arm.

    Raises:
        UserError: for an unknown field, or a combination that cannot be built.
    """
    fields = fields_of(options)
    known_fields(ModelConfig, fields)
    return replace(model, **{"drop_path_rate": 0.0, **fields})


def create(options: argparse.Namespace) -> SGMIM:
    """The model that ``--model``, ``--override`` and ``--precision`` name."""
    model = create_model(options.model, **{"drop_path_rate": 0.0, **fields_of(options)})
    return model.to(torch.bfloat16) if options.precision == "bf16" else model


def make_batch(config: ModelConfig, size: int, device: torch.device) -> Batch:
    """A batch as a loader gives it, the maps standardised."""
    image = torch.randn(size, 3, *config.hw, device=device)
    structure = torch.randn(size, config.structure_channels, *config.hw, device=device)
    rngs = [sample_rng(0, 0, index, STREAM_MASK) for index in range(size)]
    mask = torch.stack([torch.from_numpy(draw_cell_mask(rng, config.grid, RATIO)) for rng in rngs])
    masked, visible = (index.to(device) for index in mask_indices(mask))
    return image, structure, mask.to(device), masked, visible


def build(options: argparse.Namespace, size: int, device: torch.device) -> tuple[SGMIM, Batch]:
    """The model, and a batch of so many pairs."""
    torch.manual_seed(0)
    model = create(options).to(device)
    return model, make_batch(model.config, size, device)


# -- an arm


class Seconds(NamedTuple):
    """Of the parts of a step, in their order."""

    forward: float
    backward: float
    update: float
    """Clipping, optimizer and new weights; 0 where there is no optimizer."""

    @property
    def passes(self) -> float:
        return self.forward + self.backward

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.update


class Runner:
    """Runs steps of one implementation on weights of its own, equal to ``model``'s.

    Args:
        optimizer: whose AdamW makes a step of two passes a whole one; None for the passes alone. Its rate is 0: it
            computes everything and the weights stay as they are, so that all steps of all arms are the same.
    """

    def __init__(
        self, model: SGMIM, inputs: Batch, variant: Variant, precision: str, optimizer: str | None = None
    ) -> None:
        self.variant, self.inputs, self.autocast = variant, inputs, precision == "autocast"
        self.device = inputs[0].device
        variant.check(precision, self.device)
        self.model = self._model(model, variant)
        self.run = variant.compile(self.model) if variant.compiled else self.model
        self.update = None if optimizer is None else Update(self.model, optimizer, self.device)

    @staticmethod
    def _model(model: SGMIM, variant: Variant) -> nn.Module:
        if variant.backend == PEER:
            from benchmarks.timm_peer import TimmSimMIM

            return TimmSimMIM(model)
        own = copy.deepcopy(model)
        own.set_backend(variant.backend)  # type: ignore[arg-type]
        own.set_attention(variant.attention)  # type: ignore[arg-type]
        use_float8(own, variant.float8)
        return own

    def forward(self) -> Tensor:
        if self.variant.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.run(*self.inputs).loss
        return loss

    def step(self) -> Tensor:
        """Forward and backward pass; gradients add up to those that are there."""
        loss = self.forward()
        loss.backward()
        return loss.detach()

    def hold_gradients(self) -> None:
        """Zeros, in memory of their own: what a step needs beside them can then be measured."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def drop_gradients(self) -> None:
        """As trainings do between steps: backward then hands out what it has made and adds nothing up."""
        self.model.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def turn(self, steps: int, clock: harness.Clock) -> list[Seconds]:
        """So many whole steps one after the other; the host waits for the device before and after all of them."""
        clock.wait()
        marks = []
        for _ in range(steps):
            self.drop_gradients()
            start = clock.mark()
            loss = self.forward()
            between = clock.mark()
            loss.backward()
            end = clock.mark()
            if self.update is not None:
                self.update.step()
            marks.append((start, between, end, clock.mark()))
        clock.wait()
        return [self._seconds(step, clock) for step in marks]

    def _seconds(self, marks: tuple[Any, ...], clock: harness.Clock) -> Seconds:
        forward, backward, update = (clock.between(*pair) for pair in pairwise(marks))
        return Seconds(forward, backward, update if self.update is not None else 0.0)

    def warm_up(self) -> None:
        for _ in range(WARM_UP if self.device.type == "cuda" else 1):
            self.drop_gradients()
            self.step()
        synchronize(self.device)

    def state_bytes(self) -> int:
        """Weights and gradients, and what the optimizer holds beside them."""
        own = 2 * sum(parameter.nbytes for parameter in self.model.parameters())
        return own + (0 if self.update is None else self.update.state_bytes())


def release(device: torch.device) -> None:
    """Let go of compiled programs and of memory that nothing holds any more."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
