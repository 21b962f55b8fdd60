"""The plan: one row for each number of GPUs and ZeRO stage, and what to look out for."""

from dataclasses import dataclass

from sgmim_fast.planning.inputs import Inputs
from sgmim_fast.planning.remarks import warnings_about
from sgmim_fast.planning.rows import Row, row_for


@dataclass(frozen=True)
class Plan:
    """A plan and what it stands on."""

    inputs: Inputs
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    """Combinations that cannot be, with the reason."""
    warnings: tuple[str, ...]


def make_plan(inputs: Inputs) -> Plan:
    """Rows by number of GPUs, then stage."""
    rows: list[Row] = []
    left_out: list[str] = []
    stages = inputs.stages
    if inputs.precision == "bf16" and 0 in stages:
        stages = tuple(stage for stage in stages if stage > 0)
        left_out.append("ZeRO 0: DeepSpeed takes a wrong first Adam step in bf16 there")
    for gpus in inputs.gpus:
        ranks = gpus * inputs.accumulation
        if inputs.global_batch is not None and inputs.global_batch % ranks:
            left_out.append(f"{gpus} GPUs: --global-batch {inputs.global_batch} is no multiple of {ranks}")
            continue
        rows += [row_for(inputs, gpus, stage) for stage in stages]
    return Plan(inputs, tuple(rows), tuple(left_out), tuple(warnings_about(inputs, rows)))
