"""Interrupted and resumed is uninterrupted, to the bit; on another number of ranks, to rounding. Seeds differ."""

import json
from pathlib import Path

import pytest
import torch

from tests.resume_matrix import COMBINATIONS, WITH_DROP_PATH, name
from tests.training_runs import arguments, command, rows, run, same_course, succeed, train, weights


def matrix(ranks: int, *words: Path) -> Path:
    succeed(run(command(ranks, [str(word) for word in words], "tests.resume_matrix")))
    return words[1]


@pytest.fixture(scope="session")
def one(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix(1, pairs, tmp_path_factory.mktemp("matrix") / "one")


@pytest.fixture(scope="session")
def two(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix(2, pairs, tmp_path_factory.mktemp("matrix") / "two")


@pytest.mark.parametrize("which", [*(name(*combination) for combination in COMBINATIONS), *WITH_DROP_PATH])
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_every_stage_and_precision_resumes_to_the_bit(ranks: str, which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(ranks) / which
    same_course(folder / "halves", folder / "straight")
    first, last = weights(folder / "straight", 2), weights(folder / "straight", 4)
    assert any(not torch.equal(first[key], last[key]) for key in first), "training changes something"
    if "bf16" in which:  # saved is the optimizer's fp32 copy, not the rounded one that runs
        assert any(not torch.equal(value, value.bfloat16().float()) for value in last.values())


@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_step_that_is_not_finite_changes_nothing(
    ranks: str, stage: int, precision: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(ranks) / name(stage, precision) / "poisoned"
    first, skipped, third = (weights(folder, step) for step in (1, 2, 3))
    assert all(torch.equal(first[key], skipped[key]) for key in first)
    assert any(not torch.equal(third[key], skipped[key]) for key in first), "the step after it is taken"
    assert [row["skipped_steps"] for row in rows(folder)] == [0, 1, 1]
    assert rows(folder)[1]["grad_norm"] is None


@pytest.fixture(scope="session")
def one_after_two(pairs: Path, two: Path) -> Path:
    return matrix(1, pairs, two.with_name("one_after_two"), two)


@pytest.fixture(scope="session")
def two_after_one(pairs: Path, one: Path) -> Path:
    return matrix(2, pairs, one.with_name("two_after_one"), one)


@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
@pytest.mark.parametrize("ranks", ["one_after_two", "two_after_one"])
def test_another_number_of_ranks_goes_on(
    ranks: str, stage: int, precision: str, one: Path, two: Path, request: pytest.FixtureRequest
) -> None:
    """Losses of the same steps by the ranks that began, to rounding: in bf16 to that of the weights."""
    before = (two if ranks == "one_after_two" else one) / name(stage, precision)
    straight = {row["step"]: row for row in rows(before / "straight")}
    went_on = rows(request.getfixturevalue(ranks) / name(stage, precision) / "other")
    assert [row["step"] for row in went_on] == [3, 4]
    for row in went_on:
        assert row["lr"] == straight[row["step"]]["lr"]
        for key in ("loss", "image_loss", "structure_loss", "grad_norm"):
            assert row[key] == pytest.approx(straight[row["step"]][key], rel=1e-5 if precision == "fp32" else 2e-2), key
    assert not list(before.rglob(".universal"))


def test_another_seed_is_another_run(two_ranks: Path, pairs: Path, tmp_path: Path) -> None:
    """That one seed is one run, the tests of killed runs show."""
    succeed(train(2, arguments(pairs, tmp_path / "other", train__seed=1, train__max_steps=1)))
    other, first = rows(tmp_path / "other")[0], rows(two_ranks)[0]
    assert other["loss"] != first["loss"]
    state = json.loads((tmp_path / "other" / "checkpoints" / "step_000001" / "state.json").read_text())
    assert state["loader"]["seed"] == 1
    assert set(state["versions"]) >= {"sgmim_fast", "commit", "torch", "deepspeed", "numpy"}
    assert state["config"]["train"]["seed"] == 1
