"""What probes came to, as a file: written by whoever probed, read by whoever compares."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sgmim_fast.errors import UserError
from sgmim_fast.probing.data import Kind, ProbeSplits
from sgmim_fast.probing.features import Features
from sgmim_fast.probing.probes import ProbeReport
from sgmim_fast.probing.settings import ProbeSettings

SHOWN: Mapping[Kind, tuple[str, ...]] = {
    "depth": ("d1", "abs_rel", "rmse", "silog"),
    "segmentation": ("mIoU", "mAcc", "aAcc"),
}
"""Metrics that are shown where there is no room for all."""
_IMAGES = ("train", "val", "target", "train_images", "val_images", "train_sha256", "val_sha256", "kept_tokens")


@dataclass(frozen=True)
class ProbeRecord:
    """A file that ``write_record`` wrote, as far as figures are compared."""

    path: Path
    weights: str
    """What was probed: a file of weights, or what stands in the place of one."""
    figures: Mapping[Kind, Mapping[str, Mapping[str, float]]]
    """By kind, name of the probe or of what needs no features, and name of the metric."""
    conditions: Mapping[str, Any]
    """Settings, grid and images; figures are comparable where these are the same."""

    def difference(self, other: "ProbeRecord") -> str:
        """The first condition that the two do not share, in words; empty if figures of both may be compared."""
        for name, value in self.conditions.items():
            theirs = other.conditions.get(name)
            if value != theirs:
                return f"{name} is {value} in the one and {theirs} in the other"
        return next((f"{name} is in one alone" for name in other.conditions if name not in self.conditions), "")


def write_record(
    path: Path,
    weights: str,
    features: Features,
    settings: ProbeSettings,
    splits: Sequence[ProbeSplits],
    reports: Mapping[Kind, ProbeReport],
    environment: Mapping[str, Any],
) -> None:
    """Write figures and their origin as JSON.

    Args:
        weights: what was probed.
        reports: of each of the splits.
        environment: of ``describe_environment``.
    """
    written = {
        "weights": weights,
        "features": features.extractor.describe(),
        "stride": features.stride,
        "channels": features.channels,
        "cache_dtype": str(features.dtype).removeprefix("torch."),
        "settings": asdict(settings),
        "reports": {
            found.kind: asdict(reports[found.kind])
            | {"train": found.train.describe(), "val": found.val.describe(), "target": vars(found.target)}
            for found in splits
        },
        "environment": environment,
    }
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def read_record(path: Path) -> ProbeRecord:
    """Read what ``write_record`` wrote.

    Raises:
        UserError: if it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        reports = content["reports"]
        return ProbeRecord(
            path,
            str(content["weights"]),
            {
                kind: {
                    result["probe"]: {name: float(value) for name, value in result["figures"].items()}
                    for result in report["results"]
                }
                for kind, report in reports.items()
            },
            {
                "stride": content["stride"],
                **{f"settings.{name}": value for name, value in content["settings"].items()},
                **{f"{kind}.{name}": report[name] for kind, report in reports.items() for name in _IMAGES},
            },
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); probe again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not what `sgmim probe --output` writes ({type(error).__name__}: {error}); probe again"
        ) from error
