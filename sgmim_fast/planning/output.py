"""A plan as tables on a terminal, as plain columns elsewhere, as JSON for machines."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

from sgmim_fast.planning.plan import Plan
from sgmim_fast.planning.rows import Row

Column = tuple[str, Callable[[Row], str]]

STEP_COLUMNS: tuple[Column, ...] = (
    ("GPUs", lambda row: str(row.gpus)),
    ("ZeRO", lambda row: str(row.stage)),
    ("global batch", lambda row: str(row.global_batch)),
    ("step ms", lambda row: _milliseconds(row.step_seconds)),
    ("compute ms", lambda row: _milliseconds(row.compute_seconds)),
    ("comm. ms", lambda row: _milliseconds(row.communication_seconds)),
    ("exposed ms", lambda row: _milliseconds(row.exposed_seconds)),
    ("data wait ms", lambda row: _milliseconds(row.data_wait_seconds)),
    ("images/s", lambda row: f"{row.images_per_second:.0f}"),
    ("efficiency", lambda row: f"{row.efficiency:.1%}"),
)
NODE_COLUMNS: tuple[Column, ...] = (
    ("GPUs", lambda row: str(row.gpus)),
    ("ZeRO", lambda row: str(row.stage)),
    ("state GB/GPU", lambda row: f"{row.state_bytes / 1e9:.2f}"),
    ("pairs/s/node", lambda row: f"{row.node_pairs_per_second:.0f}"),
    ("GB/s/node", lambda row: f"{row.node_read_bytes_per_second / 1e9:.2f}"),
    ("ckpt GB", lambda row: f"{row.checkpoint_bytes / 1e9:.2f}"),
    ("ckpt sync s", lambda row: f"{row.checkpoint_stall_synchronous_seconds:.2f}"),
    ("ckpt async s", lambda row: f"{row.checkpoint_stall_asynchronous_seconds:.2f}"),
    ("steps", lambda row: str(row.steps)),
    ("epoch min", lambda row: "-" if row.epoch_hours is None else f"{row.epoch_hours * 60:.2f}"),
    ("total h", lambda row: "-" if row.total_hours is None else f"{row.total_hours:.2f}"),
    ("cost", lambda row: "-" if row.cost is None else f"{row.cost:.0f}"),
)
TABLES = (("a step", STEP_COLUMNS), ("a node and the run", NODE_COLUMNS))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def to_json(plan: Plan) -> str:
    """Inputs, assumptions, rows in base units (seconds, bytes), and what was left out or is doubtful."""
    return json.dumps(
        {
            "inputs": plan.inputs.as_dict(),
            "assumptions": plan.inputs.assumptions(),
            "rows": [asdict(row) for row in plan.rows],
            "left_out": plan.left_out,
            "warnings": plan.warnings,
        },
        indent=2,
    )


def plain_lines(plan: Plan) -> list[str]:
    """Everything as lines of text."""
    found = _head(plan)
    for title, columns in TABLES:
        cells = [[name for name, _ in columns], *([text(row) for _, text in columns] for row in plan.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        found += ["", title]
        found += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return [*found, "", *_foot(plan)]


def show(plan: Plan) -> None:
    """Print tables on a terminal, plain columns elsewhere."""
    if not sys.stdout.isatty():
        print("\n".join(plain_lines(plan)))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for line in _head(plan):
        console.print(line, highlight=False, markup=False)
    for title, columns in TABLES:
        table = Table(title=title, title_justify="left")
        for name, _ in columns:
            table.add_column(name, justify="right")
        previous = None
        for row in plan.rows:
            if previous is not None and row.gpus != previous:
                table.add_section()
            previous = row.gpus
            table.add_row(*(text(row) for _, text in columns))
        console.print(table)
    for line in _foot(plan):
        console.print(line, style="yellow" if line.startswith("warning") else "", highlight=False, markup=False)


def _head(plan: Plan) -> list[str]:
    inputs = plan.inputs
    measured = inputs.measured
    return [
        f"calculated, not measured, from {measured.source}",
        f"{measured.model}, {inputs.parameters.count / 1e6:.1f} M parameters in {inputs.precision}; "
        f"{measured.images_per_second:g} images/s on one GPU with {measured.batch} pairs",
    ]


def _foot(plan: Plan) -> list[str]:
    assumed = plan.inputs.assumptions()
    width = max(map(len, assumed), default=0)
    found = ["assumed, because not given:"] if assumed else []
    found += [f"  {name:{width}}  {text}" for name, text in assumed.items()]
    found += [f"left out: {text}" for text in plan.left_out]
    return found + [f"warning: {text}" for text in plan.warnings]
