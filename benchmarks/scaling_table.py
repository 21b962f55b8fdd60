"""Print the table of docs/scaling.md: every run of ``benchmarks.scaling`` that is recorded, the good and the bad.

python -m benchmarks.scaling_table
"""

import json
from typing import Any

import numpy as np
import torch

from benchmarks.scaling import RANKS, RESULTS
from sgmim_fast.config import ModelConfig
from sgmim_fast.models.registry import create_model
from sgmim_fast.planning.model_sizes import parameter_sizes
from sgmim_fast.planning.traffic import step_traffic

TITLES = ("run", "others", "ZeRO", "alone", "side by side", "communication", "predicted", "measured", "error",
          "from stage 0's", "links as measured", "without communication")  # fmt: skip


def main() -> None:
    print("\n".join(markdown([json.loads(line) for line in RESULTS.read_text().splitlines()])))


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the table.

    "links as measured" takes the measured times of collectives as they are, between two sizes in proportion, where the
    prediction has a straight line: it tells what of the error is that line's.
    """
    lines = [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    runs = list(dict.fromkeys(row["environment"]["started"] for row in rows))
    for number, started in enumerate(runs, 1):
        own = [row for row in rows if row["environment"]["started"] == started]
        links = {row["kind"]: row for row in own if row["part"] == "link"}
        lines += [_line(number, row, links) for row in own if row["part"] == "step"]
    return lines


def _line(number: int, row: dict[str, Any], links: dict[str, dict[str, Any]]) -> str:
    with torch.device("meta"):
        parameters = parameter_sizes(create_model(ModelConfig(**row["model"])))
    traffic = step_traffic(parameters, stage=row["zero_stage"], precision="fp32", gpus=RANKS)
    as_measured = sum(part.calls * interpolated(links[part.kind], part.payload / part.calls) for part in traffic)
    computation = row["predicted_seconds"] - row["predicted_communication_seconds"]
    names = ("alone", "side_by_side", "predicted_communication", "predicted", "measured")
    errors = (
        row["relative_error"],
        row["relative_error_from_stage_0"],
        (computation + as_measured) / row["measured_seconds"] - 1,
        row["relative_error_without_communication"],
    )
    cells = [
        str(number),
        f"{row['others_share']:.0%}",
        str(row["zero_stage"]),
        *(f"{row[f'{name}_seconds'] * 1e3:.0f} ms" for name in names),
        *(f"{error:+.0%}" for error in errors),
    ]
    return f"| {' | '.join(cells)} |"


def interpolated(link: dict[str, Any], payload: float) -> float:
    """Seconds of a collective of ``payload`` bytes, between the two measured sizes around it."""
    return float(np.interp(payload, link["payload_bytes"], link["p50_seconds"]))


if __name__ == "__main__":
    main()
