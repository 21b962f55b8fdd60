"""The search for the largest batch that fits into a GPU's memory."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import largest_batch
from benchmarks.step_arms import Variant
from tests.step_cases import CPU, rows_of


@pytest.mark.parametrize("limit", [0, 1, 31, 32, 33, 95, 96, 128, 130, 500, 4096])
@pytest.mark.parametrize(("first", "step"), [(32, 32), (32, 8), (24, 16), (1, 1)])
def test_the_largest_batch_is_found(limit: int, first: int, step: int) -> None:
    found = largest_batch.largest(lambda batch: batch <= limit, first, step, 512)
    best = found.largest or 0
    assert best <= limit
    assert found.failing is None or limit < found.failing
    if found.failing is None:
        assert best == 512
    else:
        assert found.failing - best <= step
    assert found.trials[0][0] == first
    assert len(found.trials) <= 20


def test_a_search_ends_where_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU its memory is made up; the step that runs in it is real in what it raises."""
    given: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (140 * 10**9, 150 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * 10**9)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: given.append(share))

    def trial(options: Any, device: Any, variant: Any, batch: int) -> dict[str, Any]:
        if batch > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"peak_reserved_bytes": batch}

    monkeypatch.setattr(largest_batch, "trial", trial)
    options = argparse.Namespace(first=32, step=32, most=1024)
    found = largest_batch.search(options, CPU, Variant.parse("triton"), 24)
    assert given == [pytest.approx(23 / 150)]  # 1 GB is the context's
    assert (found["largest_batch"], found["smallest_failing_batch"]) == (192, 224)
    assert found["peak_reserved_bytes"] == 192
    assert (found["budget_bytes"], found["context_bytes"]) == (24 * 10**9, 10**9)

    def broken(*_: Any) -> Any:
        raise ValueError("a mistake")

    monkeypatch.setattr(largest_batch, "trial", broken)
    with pytest.raises(ValueError, match="a mistake"):
        largest_batch.search(options, CPU, Variant.parse("triton"), 24)


def test_searches_go_on_where_they_were_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []
    answers: dict[tuple[str, float], dict[str, Any]] = {
        ("torch", 24.0): {"reason": "it was not ready after 3 s, all that --seconds left", "late": True},
    }
    usual = {"largest_batch": 32, "peak_reserved_bytes": 1, "training_images_per_second": 1.0}

    def ask_child(variant: Variant, budget: float, limit: Any) -> dict[str, Any]:
        asked.append((variant.name, budget))
        return dict(answers.pop((variant.name, budget), usual))

    monkeypatch.setattr(largest_batch, "ask_child", ask_child)
    monkeypatch.setattr(largest_batch.harness, "gpu", lambda: CPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    path = tmp_path / "rows.jsonl"
    words = ["--backends", "torch", "triton", "--memory-budget", "24", "80", "141", "--output", str(path)]
    options = largest_batch.arguments().parse_args(words)
    assert largest_batch.search_all(options) == 75
    assert asked == [("torch", 24), ("triton", 24), ("torch", 80), ("triton", 80)]
    assert [row.get("reason", "") for row in rows_of(path)][-1] == "this GPU has 80.0 GB"
    asked.clear()
    assert largest_batch.search_all(options) == 0
    assert asked == [("torch", 24)]
    options.step = 8  # a finer search is another one
    largest_batch.search_all(options)
    assert len(asked) == 5


def test_without_a_gpu_there_is_no_largest_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["largest_batch"])
    with pytest.raises(SystemExit) as ended:
        largest_batch.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: no CUDA GPU is visible here")
