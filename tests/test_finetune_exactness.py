"""Fine-tuning that was interrupted is fine-tuning that was not, to the bit, head, batch norms and evaluations too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dense_sets import write_scenes
from tests.finetune_matrix import COMBINATIONS, name
from tests.training_runs import command, rows, run, succeed, weights

NAMES = [name(*combination) for combination in COMBINATIONS]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "scenes", count=11, size=72)


def matrix(ranks: int, *words: Path) -> Path:
    succeed(run(command(ranks, [str(word) for word in words], "tests.finetune_matrix")))
    return words[2]


@pytest.fixture(scope="session")
def one(scenes: Path, two_ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix(1, scenes, two_ranks, tmp_path_factory.mktemp("finetune") / "one")


@pytest.fixture(scope="session")
def two(scenes: Path, two_ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix(2, scenes, two_ranks, tmp_path_factory.mktemp("finetune") / "two")


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def course(folder: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("step", "loss", "lr", "grad_norm")} for row in rows(folder)]


@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_resumes_to_the_bit(ranks: str, which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(ranks) / which
    assert [row["step"] for row in evaluations(folder / "straight")] == [2, 4]
    assert evaluations(folder / "halves") == evaluations(folder / "straight")
    assert len({row["loss"] for row in course(folder / "straight")}) == 4
    last = weights(folder / "straight", 4)
    assert any("running_mean" in key for key in last)
    assert course(folder / "halves") == course(folder / "straight")
    for key, value in weights(folder / "halves", 4).items():
        assert torch.equal(value, last[key]), key
    first = weights(folder / "straight", 2)
    for part in ("backbone.encoder.layers.0.blocks.0.attn.qkv.weight", "running_var"):
        assert any(part in key and not torch.equal(first[key], last[key]) for key in first), part
    if "bf16" in which:  # saved is the optimizer's fp32 copy, not the rounded one that runs
        assert any(not torch.equal(value, value.bfloat16().to(value.dtype)) for value in last.values())


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_an_evaluation_that_was_put_off_is_done_first(ranks: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(ranks)
    assert evaluations(folder / "stopped") == evaluations(folder / NAMES[-1] / "straight")
    assert course(folder / "stopped") == course(folder / NAMES[-1] / "straight")


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_step_that_is_not_finite_changes_nothing(ranks: str, request: pytest.FixtureRequest) -> None:
    """Running statistics of batch norms included, which the forward pass has made infinite by then."""
    folder = request.getfixturevalue(ranks) / "poisoned"
    first, skipped, third = (weights(folder, step) for step in (1, 2, 3))
    assert all(torch.equal(first[key], skipped[key]) for key in first)
    assert any("running_mean" in key and not torch.equal(third[key], skipped[key]) for key in first)
    assert [row["skipped_steps"] for row in rows(folder)] == [0, 1, 1]


@pytest.mark.parametrize("ranks", ["one after two", "two after one"])
def test_another_number_of_ranks_goes_on(
    ranks: str, one: Path, two: Path, scenes: Path, two_ranks: Path, tmp_path: Path
) -> None:
    """Cross-entropy is then the same, over as many pixels a rank; SILog is each rank's own, so its run only goes on."""
    count, before = (1, two) if ranks == "one after two" else (2, one)
    output = matrix(count, scenes, two_ranks, tmp_path / "other", before)
    for which in NAMES:
        straight, went_on = course(before / which / "straight")[2:], course(output / which / "other")
        assert [row["step"] for row in went_on] == [3, 4]
        for row, there in zip(went_on, straight, strict=True):
            assert row["lr"] == there["lr"]
            if which.startswith("segmentation"):
                rel = 1e-4 if "fp32" in which else 3e-2
                assert row["loss"] == pytest.approx(there["loss"], rel=rel)
                assert row["grad_norm"] == pytest.approx(there["grad_norm"], rel=rel)
