"""The benchmark of the training step and of its optimizers: what it measures, and what it makes of what goes wrong."""

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import deadline, harness, optimizers, step_rows, step_turns, train_step
from benchmarks.clocks import HostClock
from benchmarks.optimizers import Update
from benchmarks.step_arms import PEER, Runner, Variant, make_batch
from benchmarks.step_parity import Result, deviations, result_of, truth_of
from benchmarks.step_rows import ratio
from benchmarks.step_turns import Arm, reason_of
from sgmim_fast import UserError
from tests.step_cases import CPU, TINY, arm, run
from tests.weight_cases import randomised, tiny

# -- arms


@pytest.mark.parametrize(
    ("name", "mode", "graphs"),
    [
        ("torch+compile", "default", False),
        ("triton+compile+graphs", "reduce-overhead", True),
        ("triton+graphs", "reduce-overhead", True),
        ("reference+autotune", "max-autotune-no-cudagraphs", False),
        ("reference+autotune+graphs", "max-autotune", True),
    ],
)
def test_names_choose_how_an_arm_is_compiled(name: str, mode: str, graphs: bool) -> None:
    variant = Variant.parse(name)
    assert (variant.compiled, variant.mode, variant.graphs) == (True, mode, graphs)


def test_an_arm_in_fp8_differs_by_its_rounding() -> None:
    model = randomised(tiny("swin", depths=(1, 1), num_heads=(1, 2), embed_dim=16)).bfloat16()
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in make_batch(model.config, 2, CPU))
    plain, fp8 = (result_of(Runner(model, inputs, Variant.parse(name), "bf16")) for name in ("torch", "torch+float8"))
    found = deviations(fp8, plain)
    assert 0.01 < (found["gradient"] or 0.0) < 0.5
    assert (found["loss"] or 0.0) < 0.02
    assert Variant.parse("triton+compile+float8_rowwise").row()["float8"] == "rowwise"
    with pytest.raises(UserError, match=r"'torch\+float8' is for --precision bf16"):
        Runner(model, inputs, Variant.parse("torch+float8"), "fp32")


def test_compiled_arms_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    compile_ = torch.compile

    def compiled(model: Any, **options: Any) -> Any:
        asked.update(options)
        return compile_(model, dynamic=options["dynamic"], fullgraph=options["fullgraph"], backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compiled)
    model = randomised(tiny("swin", depths=(1, 1), num_heads=(1, 2)))
    plain, other = (result_of(arm(name, model)) for name in ("reference", "torch+graphs"))
    torch._dynamo.reset()
    assert asked == {"dynamic": False, "fullgraph": True, "mode": "reduce-overhead"}
    assert max(value or 0.0 for value in deviations(other, plain).values()) < 1e-5


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_timms_encoders_are_held_against_ours_with_the_same_weights(encoder: str) -> None:
    model = randomised(tiny(encoder, guidance="none"))
    ours, theirs = result_of(arm("reference", model)), result_of(arm(PEER, model))
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-6)
    assert theirs.norm == pytest.approx(ours.norm, rel=1e-5)
    assert deviations(theirs, ours)["gradient"] is None  # other names


def test_timm_refuses_what_it_cannot_express() -> None:
    with pytest.raises(UserError, match="no guidance 'relational'; compare them with a simmim_"):
        arm(PEER, randomised(tiny("swin")))
    with pytest.raises(UserError, match="leave normalize_target_window out"):
        arm(PEER, randomised(tiny("swin", guidance="none", normalize_target_window=3)))


@pytest.mark.parametrize("size", [1, 11])
def test_the_truth_is_taken_in_parts(size: int) -> None:
    model = randomised(tiny("swin"))
    runner = arm("reference", model, size)
    truth = truth_of(model, runner.inputs)
    assert max(value or 0.0 for value in deviations(result_of(runner), truth).values()) < 1e-5


def test_deviations_are_relative_and_see_every_gradient() -> None:
    true = Result(2.0, {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])})
    got = Result(1.0, {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.0])})
    found = deviations(got, true)
    assert found["loss"] == 0.5
    assert found["gradient"] == pytest.approx(0.1)
    assert found["gradient_norm"] == pytest.approx((25.25**0.5 - 5) / 5, rel=1e-4)


def test_a_turn_is_whole_steps_that_leave_the_weights_alone() -> None:
    model = randomised(tiny("swin"))
    runner = arm("torch", model, optimizer="adamw")
    before = [parameter.clone() for parameter in runner.model.parameters()]
    taken = runner.turn(2, HostClock())
    assert len(taken) == 2
    assert all(part > 0 for seconds in taken for part in seconds)
    assert all(map(torch.equal, before, runner.model.parameters()))
    assert runner.update is not None
    assert sum(len(state) for state in runner.update.optimizer.state.values())  # it has stepped
    assert arm("torch", model).turn(1, HostClock())[0].update == 0.0


def test_parts_of_a_step_are_between_its_marks() -> None:
    class Ticks(HostClock):
        def __init__(self) -> None:
            self.marks = iter([0.0, 1.0, 3.0, 7.0, 10.0, 12.0, 13.0, 13.5])

        def mark(self) -> float:
            return next(self.marks)

    taken = arm("torch", randomised(tiny("swin")), optimizer="adamw").turn(2, Ticks())
    assert [tuple(seconds) for seconds in taken] == [(1.0, 2.0, 4.0), (2.0, 1.0, 0.5)]
    assert taken[0].passes == 3.0
    assert taken[0].step == 7.0


# -- the update


def test_an_update_in_bf16_is_that_of_float32_weights() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).to(torch.bfloat16)
    exact = torch.nn.Linear(5, 3)
    with torch.no_grad():
        for mine, theirs in zip(exact.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    update = Update(model, "adamw", CPU)
    config = update.config
    decay = [
        {"params": [exact.weight], "weight_decay": config.weight_decay},
        {"params": [exact.bias], "weight_decay": 0},
    ]
    plain = torch.optim.AdamW(decay, lr=1e-3, betas=config.betas, eps=config.eps)
    for _ in range(3):
        for mine, theirs in zip(exact.parameters(), model.parameters(), strict=True):
            theirs.grad = (20 * torch.randn(theirs.shape)).to(torch.bfloat16)  # beyond the norm that is clipped to
            mine.grad = theirs.grad.float()
        torch.nn.utils.clip_grad_norm_(exact.parameters(), config.clip_grad_norm)
        update.step(1e-3)
        plain.step()
    for mine, theirs in zip(exact.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(theirs, mine.to(torch.bfloat16), rtol=1e-2, atol=1e-4)
    for mine, master in zip(exact.parameters(), update.masters, strict=True):
        torch.testing.assert_close(master, mine, rtol=1e-3, atol=1e-4)
    held = sum(state[name].nbytes for state in update.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    held += sum(master.nbytes + master.grad.nbytes for master in update.masters if master.grad is not None)
    assert update.state_bytes() == held


def test_optimizers_that_cannot_run_leave_a_row_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "create_model", lambda *_, **__: randomised(tiny("swin")))
    monkeypatch.setattr(optimizers, "SECONDS", 0.01)
    status, rows = run(monkeypatch, optimizers, tmp_path / "rows.jsonl", "--device", "cpu")
    assert status == 0
    assert [row["implementation"] for row in rows] == list(optimizers.NAMES)
    for row in rows[:3]:
        assert 0 < row["p20_seconds"] <= row["p50_seconds"]
        assert row["error"] < 1e-4  # of a change of a thousandth, in float32
        assert row["floor_bytes"] == 28 * row["parameters"]
    assert [row["benchmark"] for row in rows] == ["optimizers"] * 3 + ["optimizers_skipped"] * 2
    assert rows[3]["reason"].startswith('cannot run here: optimizer.implementation "apex"')
    assert "needs a GPU" in rows[4]["reason"]


def test_an_optimizer_that_is_wrong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "create_model", lambda *_, **__: randomised(tiny("swin")))
    monkeypatch.setattr(optimizers, "SECONDS", 0.01)
    made = optimizers.optimizer_of

    def lazy(groups: Any, name: str, *rest: Any) -> Any:
        return made(groups[:1] if name == "foreach" else groups, name, *rest)

    monkeypatch.setattr(optimizers, "optimizer_of", lazy)
    words = ["--device", "cpu", "--implementations", "plain", "foreach"]
    assert run(monkeypatch, optimizers, tmp_path / "rows.jsonl", *words)[0] == 1


# -- turns


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Lets chosen arms take their time, or fail."""
    warm_up = Runner.warm_up

    def choose(**failing: BaseException) -> None:
        def warmed(self: Runner) -> None:
            if (error := failing.get(self.variant.backend)) is not None:
                raise error
            warm_up(self)

        monkeypatch.setattr(Runner, "warm_up", warmed)

    return choose


def words(*more: str) -> list[str]:
    return ["--override", *TINY, "--device", "cpu", "--steps", "2", *more]


def test_arms_that_do_not_fit_leave_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: Callable[..., Any]
) -> None:
    monkeypatch.setattr(train_step, "peak_in_child", lambda *_: 1)
    slow(reference=torch.OutOfMemoryError("CUDA out of memory"))
    status, rows = run(
        monkeypatch,
        train_step,
        tmp_path / "rows.jsonl",
        *words("--backends", "reference", "torch", "--batch", "1", "2"),
    )
    assert status == 0
    assert [(row["benchmark"], row["arm"], row["batch"]) for row in rows] == [
        ("train_step_skipped", "reference", 1),
        ("train_step", "torch", 1),
        ("train_step_skipped", "reference", 2),
        ("train_step", "torch", 2),
    ]
    assert rows[0]["reason"] == "out of memory"
    found = rows[1]
    assert found["yardstick"] == "torch"
    assert found["p50_time_ratio"] == 1.0
    assert found["ratios"] == {}
    assert found["gradient_error"] < 1e-4
    assert found["step_p50_seconds"] >= found["update_p50_seconds"] > 0
    assert found["images_per_second"] == pytest.approx(1 / found["p50_seconds"])


def test_arms_that_fail_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: Callable[..., Any]) -> None:
    monkeypatch.setattr(train_step, "peak_in_child", lambda *_: 1)
    slow(torch=ValueError("broken\nsecond line"))
    path = tmp_path / "rows.jsonl"
    status, rows = run(monkeypatch, train_step, path, *words("--backends", "reference", "torch", "timm", "--no-parts"))
    assert status == 1
    assert [(row["arm"], row.get("reason", "")) for row in rows[:2]] == [
        ("torch", "ValueError: broken"),
        ("timm", "cannot run here: timm's encoders have no guidance 'relational'; compare them with a simmim_* model"),
    ]
    assert rows[2]["ratios"] == {"reference": 1.0}
    assert "parts" not in rows[2]


def test_time_that_is_over_ends_a_compilation() -> None:
    limited = deadline.Deadline(0.05)
    endless = itertools.repeat(None)
    with pytest.raises(deadline.NotReadyError, match="not ready after 0 s"), limited.limit(reserve=0.0):
        sum(1 for _ in endless)
    with pytest.raises(deadline.NotReadyError, match="the time given by --seconds is over"), limited.limit():
        pytest.fail("there was no time")
    with deadline.Deadline(None).limit():
        assert deadline.Deadline(None).left() == float("inf")


def test_time_that_is_over_is_neither_swallowed_nor_an_error_of_the_compiler() -> None:
    """Compilers take an error for a choice that does not work, or wrap it."""

    def swallows() -> None:
        for _ in itertools.repeat(None):
            with contextlib.suppress(Exception):
                time.sleep(0.01)

    def wraps() -> None:
        try:
            time.sleep(5.0)
        except BaseException as error:
            raise RuntimeError("the compiler is broken") from error

    for compiler in (swallows, wraps):
        limited = deadline.Deadline(0.05)
        with pytest.raises(deadline.NotReadyError, match="not ready after 0 s"), limited.limit(reserve=0.0):
            compiler()
    with pytest.raises(RuntimeError, match="at once"), deadline.Deadline(60.0).limit():
        raise RuntimeError("at once")


def test_turns_end_with_the_time_and_without_arms_that_fail() -> None:
    taken: list[str] = []

    def make(name: str, failing: int = 99) -> Arm:
        def turn(steps: int, clock: Any) -> list[step_turns.Seconds]:
            taken.append(name)
            if taken.count(name) == failing:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [step_turns.Seconds(1.0, 2.0, 3.0), step_turns.Seconds(3.0, 2.0, 1.0)]

        runner: Any = SimpleNamespace(turn=turn, device=CPU)
        return Arm(runner, Result(0.0, {}), None, 0, 0, 0.0)

    arms = {"a": make("a"), "b": make("b", failing=2)}
    assert step_turns.take_turns(arms, 5, 2, deadline.Deadline(0.0)) == {"b": "out of memory"}
    assert taken == ["a", "b", "a", "b", "a"]
    assert list(arms) == ["a"]
    assert arms["a"].turns == [step_turns.Seconds(2.0, 2.0, 2.0)] * step_turns.LEAST_TURNS


def test_ratios_are_taken_turn_by_turn() -> None:
    runner: Any = None
    one, other = (Arm(runner, Result(0.0, {}), None, 0, 0, 0.0) for _ in range(2))
    for mine, theirs in ((1.0, 2.0), (10.0, 20.0), (3.0, 3.0)):
        one.turns.append(step_turns.Seconds(mine, 0.0, 5.0))
        other.turns.append(step_turns.Seconds(theirs, 0.0, 0.0))
    assert ratio(one, other, "passes") == 0.5


def test_shares_of_what_the_device_does_at_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_rows, "device_peak_tflops", lambda *_: 1000.0)
    runner: Any = SimpleNamespace(variant=Variant.parse("triton"), state_bytes=lambda: 1)
    result = Result(1.0, {"a": torch.ones(1)})
    ready = Arm(runner, result, 0, 10, 0, 0.0, [step_turns.Seconds(0.1, 0.2, x) for x in (0.1, 0.2, 0.3)])
    words = ["--device", "cuda", "--precision", "bf16"]
    options = train_step.arguments().parse_args(words)
    ceilings = harness.Ceilings(4e12, 8e14, 2e-6, products=5e14)
    row = step_rows.finished_row(options, 128, {"triton": ready}, "triton", result, 10**14, ceilings)
    assert (row["step_p20_seconds"], row["step_p50_seconds"], row["step_p80_seconds"]) == pytest.approx(
        (0.44, 0.5, 0.56)
    )
    assert row["share_of_matrix"] == pytest.approx(1e14 / 0.3 / 8e14)
    assert row["step_share_of_matrix"] == pytest.approx(0.25)
    assert row["step_share_of_products"] == pytest.approx(0.4)
    assert row["step_share_of_datasheet"] == pytest.approx(0.2)
    assert row["training_images_per_second"] == pytest.approx(256)
    none = replace(ceilings, products=None)
    assert (
        step_rows.finished_row(options, 128, {"triton": ready}, "triton", result, 1, none)["step_share_of_products"]
        is None
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: out of memory"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
        (RuntimeError("a shape is wrong"), "RuntimeError: a shape is wrong"),
    ],
)
def test_memory_runs_out_under_several_names(error: Exception, said: str) -> None:
    assert reason_of(error) == said
    wrapped = ValueError("the compiler failed")
    wrapped.__cause__ = error
    assert (reason_of(wrapped) == "out of memory") == (said == "out of memory")


def test_memory_of_an_arm_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it goes without one: what is asked of PyTorch, and in which order."""
    reserved = iter([100, 180, 100])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    monkeypatch.setattr(step_turns, "result_of", lambda runner: Result(1.0, {}))
    monkeypatch.setattr(step_turns, "activations_on_gpu", lambda runner: 5)
    monkeypatch.setattr(step_turns.harness, "peak_bytes", lambda call: 7)
    asked: list[str] = []

    def make(name: str) -> Callable[[], Any]:
        def note(what: str) -> Callable[[], None]:
            return lambda: asked.append(what)

        names = ("warm_up", "drop_gradients", "hold_gradients", "step")
        device = torch.device("cuda")
        return lambda: SimpleNamespace(variant=Variant.parse(name), device=device, **{n: note(n) for n in names})

    graphs = step_turns.prepare(make("triton+graphs"), lambda: 0)
    assert (graphs.activation_bytes, graphs.step_memory_bytes) == (None, 80)
    assert asked == ["warm_up", "drop_gradients"]
    asked.clear()
    eager = step_turns.prepare(make("triton"), lambda: 0)
    assert (eager.activation_bytes, eager.step_memory_bytes) == (5, 7)
    assert asked == ["warm_up", "hold_gradients", "drop_gradients"]
