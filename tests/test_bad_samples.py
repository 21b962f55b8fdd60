"""The log of bad samples."""

import json
from pathlib import Path

import pytest

from sgmim_fast.data.substitution import BadSample
from sgmim_fast.train.bad_samples import BadSampleLog


def test_any_rank_may_be_the_first_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, said = tmp_path / "runs/new", []
    BadSampleLog(run, 1)(BadSample(0, 7, 3, "x.jpg: cannot be read"))
    BadSampleLog(run, 0, said.append)(BadSample(1, 8, 4, "y.jpg: cannot be read"))
    assert [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()] == [
        {"rank": 1, "epoch": 0, "sample": 7, "substitute": 3, "reason": "x.jpg: cannot be read"},
        {"rank": 0, "epoch": 1, "sample": 8, "substitute": 4, "reason": "y.jpg: cannot be read"},
    ]
    assert capsys.readouterr().err == "warning: x.jpg: cannot be read; pair 3 stands in for pair 7\n"
    assert said == ["warning: y.jpg: cannot be read; pair 4 stands in for pair 8"]
