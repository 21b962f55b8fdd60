"""What the benchmark of the kernels times, whether that is right, and how it goes on where it was stopped."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bars, kernels, tested
from benchmarks.cases import PLAIN, Case, tensors
from benchmarks.exactness import parity
from benchmarks.peers import (
    ATTENTIONS,
    COMPILED,
    NAMES,
    NORMS,
    Contender,
    contender,
    expresses,
    flex_class_token_attention,
    flex_window_attention,
)
from benchmarks.rows import Row, Rows, read
from benchmarks.shapes import all_cases, class_token_of, guidance_of, layer_case, norms_of, smoke_cases, window_case
from sgmim_fast.errors import EXIT_PREEMPTED, UserError
from sgmim_fast.recipes import MODELS
from tests.kernel_cases import DEVICE

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
WINDOWS = window_case("tiny", batch=3, side=8, heads=2, window=4, shift=2, size=16, cosine=True)
LAYER = layer_case("tiny", batch=2, side=8, heads=2, window=4, shift=2, size=8)
NORM, RESIDUAL = norms_of("tiny", batch=2, tokens=4, channels=8)


def right(name: str, case: Case, device: torch.device = CPU) -> bool:
    found = parity(name, contender(name, case, device, torch.float32), case, torch.float32, device)
    return found.correct and found.error < 1e-4


# -- what is timed


@pytest.mark.parametrize("batch", [1, 2, 256])
def test_cases_fit_the_plain_functions(batch: int) -> None:
    """On the meta device: shapes alone."""
    names = []
    for case in all_cases(batch):
        names.append((case.op, case.name))
        inputs = {name: torch.empty(shape, device="meta") for name, shape in case.shapes.items()}
        for name in case.wanted():
            inputs[name].requires_grad_()
        if case.index is not None:
            keyword, count, places = case.index
            assert 0 < count < places
            inputs[keyword] = torch.empty(case.batch, count, dtype=torch.int32, device="meta")
        outs = tensors(case.truth(**inputs))
        assert all(out.requires_grad == (case.backward is not None) for out in outs)
        read = sum(x.nbytes for name, x in inputs.items() if case.is_batched(name) and name not in case.fixed)
        if case.index is None:  # all of the inputs is read, and the output written
            assert case.forward(4).bytes == read + sum(out.nbytes for out in outs)
    assert len(set(names)) == len(names)
    assert {op for op, _ in names} == set(PLAIN) == {*bars.MEMORY_BOUND, *ATTENTIONS, *NORMS, "attention_layer"}


def test_every_model_and_window_is_among_the_cases() -> None:
    found = {(case.name.split(",")[0].split(" stage")[0], bars.window_of({"shapes": case.shapes}))
             for case in all_cases() if case.op == "window_attention"}  # fmt: skip
    assert found >= {
        *(("Swin-B", 6), ("Swin-B", 12), ("Swin-L", 12), ("SwinV2-B", 12)),
        *(("fine-tuning", 7), ("fine-tuning", 22), ("fine-tuning", 30), ("fine-tuning V2", 24)),
    }


def test_batch_sizes_take_turns() -> None:
    options = kernels.arguments().parse_args(["--batches", "1", "8", "256"])
    cases = kernels.cases_of(options)
    assert [case.batch for case in cases[:6]] == [1, 8, 256, 1, 8, 256]
    assert cases[0].name == cases[2].name != cases[3].name
    keys = [(case.op, case.name, case.batch) for case in cases]
    assert len(set(keys)) == len(keys)


def test_smoke_cases_have_every_operation() -> None:
    assert {case.op for case in smoke_cases()} == set(PLAIN)


def test_made_inputs_are_as_the_case_says() -> None:
    case = next(case for case in all_cases(batch=2) if case.op == "masked_l1")
    inputs = case.make(torch.float16, CPU, seed=0)
    assert inputs["prediction"].dtype == torch.float16
    assert inputs["prediction"].requires_grad
    assert inputs["picture"].dtype == torch.float32
    assert not inputs["picture"].requires_grad
    index = inputs["index"]
    assert (index.diff(dim=1) > 0).all()
    assert 0 <= index.min() <= index.max() < 36
    other = case.make(torch.float16, CPU, seed=1)["prediction"]
    assert not torch.equal(inputs["prediction"], other)


# -- whether it is right


@pytest.mark.parametrize("name", ["triton", "plain", "sdpa"])
def test_right_implementations_pass(name: str) -> None:
    assert right(name, WINDOWS, torch.device(DEVICE))


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lambda out, qkv, table: out * 1.001, "result"),
        (lambda out, qkv, table: torch.cat((out[:-1], out[:1])), "result"),  # right but for the last sample
        (lambda out, qkv, table: out + (table - table.detach()).sum(), "gradient of table"),
        (lambda out, qkv, table: out * torch.nan, "result"),
    ],
)
def test_wrong_implementations_are_named(spoil: Callable[..., Tensor], where: str) -> None:
    function = Contender(lambda **inputs: spoil(tensors(WINDOWS.truth(**inputs))[0], inputs["qkv"], inputs["table"]))
    found = parity("triton", function, WINDOWS, torch.float32, torch.device(DEVICE))
    assert not found.correct
    assert found.worst == where


def test_all_results_and_gradients_are_compared() -> None:
    def spoiled(**inputs: Tensor) -> tuple[Tensor, ...]:
        total, norm = tensors(RESIDUAL.truth(**inputs))
        return total, norm + (inputs["branch"] - inputs["branch"].detach())

    assert right("plain", RESIDUAL)
    found = parity("apex", Contender(spoiled), RESIDUAL, torch.float32, CPU)
    assert found.worst == "gradient of branch"
    wrong = Contender(lambda **inputs: (tensors(RESIDUAL.truth(**inputs))[0], 1.01 * RESIDUAL.truth(**inputs)[1]))
    assert parity("apex", wrong, RESIDUAL, torch.float32, CPU).worst == "result 2"


def test_a_single_sample_is_compared() -> None:
    single = window_case("tiny", batch=1, side=8, heads=2, window=4, shift=2, size=16)
    assert right("triton", single, torch.device(DEVICE))


def test_dense_attention_is_what_guidance_replaces() -> None:
    assert right("dense", guidance_of("tiny", MODELS["sgmim_swin_base"], batch=2))


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("name", ["timm", "timm-fused"])
def test_the_attention_of_timm_is_ours(name: str, shift: int) -> None:
    assert right(name, replace(LAYER, constants={"window": 4, "shift": shift}))


@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_attention_layers(name: str) -> None:
    assert right(name, LAYER, torch.device(DEVICE))


@pytest.mark.parametrize(("name", "case"), [("xformers", WINDOWS), ("xformers", LAYER), ("apex", NORM)])
def test_a_library_that_cannot_run_says_why(name: str, case: Case) -> None:
    with pytest.raises(UserError, match=r"needs a GPU|is not installed|not NVIDIA's"):
        contender(name, case, CPU, torch.float32)


@pytest.mark.parametrize("case", [NORM, RESIDUAL], ids=["norm", "residual"])
def test_norms_have_no_kernel_of_ours(case: Case) -> None:
    assert [name for name in NAMES if expresses(name, case)] == [
        *("plain", *(["apex"] if case is NORM else []), "copy", "compiled", "max-autotune")
    ]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shift", [0, 2])
def test_flex_attention_is_window_attention(shift: int) -> None:
    case = replace(WINDOWS, constants={"window": 4, "shift": shift})
    inputs = {name: x.detach() for name, x in case.make(torch.float32, CPU, 0).items()}
    torch.testing.assert_close(flex_window_attention(**inputs, **case.constants), case.truth(**inputs))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_class_token_attention() -> None:
    case = class_token_of("tiny", replace(MODELS["sgmim_vit_base"], image_size=64, embed_dim=32, num_heads=(2,)), 2)
    inputs = {name: x.detach() for name, x in case.make(torch.float32, CPU, 0).items()}
    torch.testing.assert_close(flex_class_token_attention(**inputs, **case.constants), case.truth(**inputs))


# -- the whole of it, in the smallest size


SOME = ["--ops", "gather_rows", "layer_norm", "--implementations", "triton", "plain", "apex", "copy"]


def parsed(output: Path, *words: str) -> Any:
    return kernels.arguments().parse_args(["--smoke", "--dtypes", "fp32", "--output", str(output), *words])


@pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter")
def test_smoke_run_goes_on_where_it_was_stopped(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "kernels.jsonl"
    verdict = {"file": "test_masked_tokens", "select": kernels.SMOKE_TESTS, "status": "green", "said": "as before"}
    Rows(tmp_path / "tests.jsonl", CPU).append(verdict)
    assert kernels.run(parsed(output, *SOME), CPU) == 0
    rows = read(output)
    found = {(row["op"], row["implementation"], row.get("pass")): row for row in rows}
    assert len(found) == len(rows)
    for implementation, status in (("triton", "green"), ("plain", None)):
        for part in ("forward", "backward", "both"):
            row = found["gather_rows", implementation, part]
            assert 0 < row["p20_seconds"] <= row["p50_seconds"] <= row["p80_seconds"]
            assert row["correct"]
            assert row["error"] == row["plain_error"] == 0
            assert row["bytes_per_second"] == row["floor_bytes"] / row["p50_seconds"]
            assert row["tests"] == status
            assert row["ceilings"]["products_flops_per_second"] > 0
            assert row["smoke"]
    assert "Apex" in found["layer_norm", "apex", None]["failed"]

    capsys.readouterr()
    assert kernels.run(parsed(output, *SOME), CPU) == 0
    assert "6 measured before" in capsys.readouterr().out
    assert kernels.run(parsed(output, *SOME, "--again", "--seconds", "0"), CPU) == EXIT_PREEMPTED
    assert "0 s are over; 6 not measured" in capsys.readouterr().out
    assert read(output) == rows


@pytest.fixture
def options(tmp_path: Path) -> Any:
    return parsed(tmp_path / "kernels.jsonl", "--ops", "gather_rows", "--implementations", "triton")


def test_red_tests_are_not_timed(options: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    red = {"test_masked_tokens": tested.Verdict("red", "1 failed")}
    monkeypatch.setattr(tested, "verdicts", lambda *_: red)
    assert kernels.run(options, CPU) == 1
    assert "NOT TIMED: tests/test_masked_tokens.py is red (1 failed)" in capsys.readouterr().out
    assert read(options.output) == []


@pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter")
def test_what_fails_or_is_wrong_is_told(options: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    options.implementations = ["triton", "plain"]
    monkeypatch.setattr(tested, "verdicts", lambda *_: {"test_masked_tokens": tested.Verdict("green", "")})
    usual = kernels.Run.measure

    def measure(self: kernels.Run, name: str, case: Case, dtype: str) -> list[Row]:
        if name == "plain":
            raise RuntimeError("out of\nmemory")
        spoiled = replace(case, constants={})
        object.__setattr__(spoiled, "truth", lambda **inputs: 2 * tensors(case.truth(**inputs))[0])
        return usual(self, name, spoiled, dtype)

    monkeypatch.setattr(kernels.Run, "measure", measure)
    assert kernels.run(options, CPU) == 1
    out = capsys.readouterr().out
    assert "triton: WRONG, not timed: result off by" in out
    assert "plain: failed: RuntimeError: out of" in out
    wrong, failed = read(options.output)
    assert "p50_seconds" not in wrong
    assert failed["failed"] == "RuntimeError: out of"
    assert kernels.run(options, CPU) == 1  # what is wrong is tried again


@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing to compile with")
def test_compiled_peers_are_timed(options: Any) -> None:
    """Their backward passes again and again, on one graph."""
    options.ops, options.implementations = ["residual_norm"], ["compiled"]
    assert kernels.run(options, CPU) == 0
    assert [row["pass"] for row in read(options.output)] == ["forward", "backward", "both"]


def test_a_gpu_that_is_lost_ends_the_run(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes afterwards would fail for that reason, and must not be recorded as unable."""

    def measure(*_: Any) -> None:
        raise RuntimeError("an illegal memory access")

    options.implementations = ["plain", "copy"]
    monkeypatch.setattr(kernels.Run, "measure", measure)
    monkeypatch.setattr(kernels, "usable", lambda device: False)
    assert kernels.run(options, CPU) == 1
    assert [row["implementation"] for row in read(options.output)] == ["plain"]


def test_compiled_peers_come_last(options: Any) -> None:
    options.implementations = list(NAMES)
    order = [name in COMPILED for name, _, _ in kernels.plan(options)]
    assert order == sorted(order)
