"""Print what docs/scaling.md shows of the newest run of ``benchmarks.scaling``.

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


def main() -> None:
    print("\n".join(markdown([json.loads(line) for line in RESULTS.read_text().splitlines()])))


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """The table of docs/scaling.md, of the newest run among ``rows``.

    Its last but one column takes the measured times of collectives as they are, between two sizes in proportion, where
    the prediction has a straight line: it tells what of the error is that line's.
    """
    last = rows[-1]["environment"]["started"]
    rows = [row for row in rows if row["environment"]["started"] == last]
    steps = [row for row in rows if row["part"] == "step"]
    links = {row["kind"]: row for row in rows if row["part"] == "link"}
    with torch.device("meta"):
        parameters = parameter_sizes(create_model(ModelConfig(**steps[0]["model"])))
    titles = ("ZeRO", "alone", "side by side", "communication", "predicted", "measured", "error", "from stage 0's",
              "links as measured", "without communication")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in steps:
        stage, measured = row["zero_stage"], row["measured_seconds"]
        traffic = step_traffic(parameters, stage=stage, precision="fp32", gpus=RANKS)
        computation = row["predicted_seconds"] - row["predicted_communication_seconds"]
        as_measured = sum(part.calls * interpolated(links[part.kind], part.payload / part.calls) for part in traffic)
        names = ("alone", "side_by_side", "predicted_communication", "predicted", "measured")
        times = [f"{row[f'{name}_seconds'] * 1e3:.0f} ms" for name in names]
        errors = (
            row["relative_error"],
            row["relative_error_from_stage_0"],
            (computation + as_measured) / measured - 1,
            row["relative_error_without_communication"],
        )
        lines.append(f"| {' | '.join([str(stage), *times, *(f'{error:+.0%}' for error in errors)])} |")
    return lines


def interpolated(link: dict[str, Any], payload: float) -> float:
    """Seconds of a collective of ``payload`` bytes, between the two measured sizes around it."""
    return float(np.interp(payload, link["payload_bytes"], link["p50_seconds"]))


if __name__ == "__main__":
    main()
