"""Where the time of a step goes: what the profiler's events are taken for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import deadline, step_profile, train_step
from benchmarks.step_arms import PEER, Variant
from benchmarks.step_parity import Result
from benchmarks.step_turns import Arm
from sgmim_fast import create_model
from tests.step_cases import arm
from tests.weight_cases import tiny


@pytest.mark.parametrize(("name", "guidance"), [("reference", "relational"), ("torch", "relational"), (PEER, "none")])
def test_every_part_of_an_eager_step_takes_time(name: str, guidance: str) -> None:
    runner = arm(name, create_model(tiny("swin", guidance=guidance)), optimizer="adamw")
    runner.warm_up()
    found = step_profile.profiled(runner)
    expected = {"attention", "encoder, rest", "heads", "matrix products", "norms", "optimizer", "losses, rest"}
    assert set(found["parts"]) == expected | ({"guidance"} if guidance != "none" else set())
    assert all(seconds > 0 for seconds in found["parts"].values())
    assert found["parts_by"] == "modules"
    assert "forward" not in vars(runner.model.encoder)  # the ranges are gone again


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_backward_pass_is_of_the_modules_that_made_it(backend: str) -> None:
    runner = arm(backend, create_model(tiny("swin")))
    events = list(step_profile._record(runner, by_module=True))
    makers = step_profile._makers(events)
    places: dict[str, set[str]] = {}
    for event in events:
        if step_profile._node(event) is not None and event.name in ("aten::bmm", "aten::mm", "aten::sgn"):
            places.setdefault(event.name, set()).add(step_profile._place(event, makers))
    assert places["aten::mm"] == {"attention", "encoder, rest", "guidance", "heads"} - (
        {"heads"} if backend == "reference" else set()  # whose heads are convolutions
    )
    assert places["aten::bmm"] == {"attention", "guidance"}
    assert places["aten::sgn"] == {"losses, rest"}  # of the absolute errors


class Event(SimpleNamespace):
    """What the profiler would tell of an operation, a kernel or a range."""

    def __init__(self, name: str, parent: Any = None, **more: Any) -> None:
        usual = {"device_type": DeviceType.CPU, "sequence_nr": -1, "is_user_annotation": False, "kernels": []}
        start = more.pop("start", 0)
        super().__init__(name=name, cpu_parent=parent, **{**usual, **more})
        self.time_range = SimpleNamespace(start=start, elapsed_us=lambda: more.get("microseconds", 0))
        self.self_device_time_total = sum(kernel.duration for kernel in self.kernels)


def kernel(name: str, duration: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, duration=duration)


def test_kernels_are_of_the_operations_that_start_them() -> None:
    """A made-up trace of a GPU: an eager step's forward and backward pass, on two threads."""
    outer = Event(step_profile.RANGE + "losses, rest", is_user_annotation=True)
    encoder = Event(step_profile.RANGE + "encoder, rest", outer, is_user_annotation=True)
    attention = Event(step_profile.RANGE + "attention", encoder, is_user_annotation=True)
    view = Event("aten::view", encoder, sequence_nr=7, start=1)  # makes no node, so that it tells the next one's number
    linear = Event("aten::linear", attention, sequence_nr=7, start=2)
    product = Event("aten::addmm", linear, sequence_nr=7, start=3, kernels=[kernel("nvjet", 5)])
    window = Event("sgmim_fast::window_attention", attention, sequence_nr=8, start=4, kernels=[kernel("_forward", 11)])
    node = Event(step_profile.NODE + "AddmmBackward0", None, sequence_nr=7, start=9)
    named = Event("AddmmBackward0", node, sequence_nr=7, start=10)
    back = Event("aten::mm", named, start=11, kernels=[kernel("nvjet", 10)])
    other = Event(step_profile.NODE + "GeneratedBackward", None, sequence_nr=8, start=8)
    window_back = Event("sgmim_fast::window_attention_backward", other, kernels=[kernel("_backward", 23)])
    copy = Event("Memcpy", device_type=DeviceType.CUDA, microseconds=3)
    events = [outer, encoder, attention, view, linear, product, window, node, named, back, other, window_back, copy]
    found = step_profile.parts_of(events, on_gpu=True, by_module=True)
    assert found == pytest.approx({"attention": 34e-6, "matrix products": 15e-6})
    assert list(found) == ["attention", "matrix products"]  # the longest first


@pytest.mark.parametrize(
    ("names", "kernel_name", "part"),
    [
        (["sgmim_fast::window_attention", "CompiledFunction"], "_forward_whole", "attention"),
        (["sgmim_fast::guidance_attention_backward"], "_backward_keys", "guidance"),
        (["sgmim_fast::gather_tokens"], "_gather", "losses, rest"),
        (["aten::addmm"], "sm90_xmma_gemm_bf16", "matrix products"),
        (["CompiledFunction"], "nvjet_tst_192x128", "matrix products"),
        (["CompiledFunction"], "triton_tem_fused_addmm_3", "matrix products"),
        (["CompiledFunction"], "triton_per_fused_add_native_layer_norm_7", "norms"),
        (["CompiledFunction"], "triton_poi_fused_gelu_1", "fused"),
        (["aten::_efficient_attention_forward"], "fmha_cutlassF_bf16", "attention"),
        (["aten::copy_"], "elementwise_kernel", "losses, rest"),
    ],
)
def test_kernels_of_compiled_programs_are_told_apart(names: list[str], kernel_name: str, part: str) -> None:
    assert step_profile.part_of_kernel(names, kernel_name) == part


def test_compiled_steps_tell_their_optimizer_apart() -> None:
    update = Event(step_profile.RANGE + "optimizer", is_user_annotation=True)
    events = [
        Event("aten::_fused_adamw_", update, kernels=[kernel("multi_tensor", 2)]),
        Event("CompiledFunction", None, kernels=[kernel("triton_red_fused_layer_norm", 3), kernel("nvjet", 4)]),
    ]
    found = step_profile.parts_of(events, on_gpu=True, by_module=False)
    assert found == pytest.approx({"matrix products": 4e-6, "norms": 3e-6, "optimizer": 2e-6})


def test_launches_and_top_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def shadow(name: str, microseconds: float) -> Event:
        return Event(name, device_type=DeviceType.CUDA, microseconds=microseconds)

    annotation = Event("Torch-Compiled Region", device_type=DeviceType.CUDA, is_user_annotation=True, microseconds=99)
    launches = [
        Event("cudaLaunchKernel"),
        Event("cuLaunchKernelEx"),
        Event("cudaGraphLaunch"),
        Event("cudaMemcpyAsync"),
    ]
    # Three steps of these are recorded.
    events = [annotation, *launches * 3, *[shadow("a", 3.0), shadow("b", 4.0), shadow("a", 2.0)] * 3]
    monkeypatch.setattr(step_profile, "_record", lambda *_: events)
    runner: Any = SimpleNamespace(variant=Variant.parse("triton+graphs"), device=torch.device("cuda"))
    found = step_profile.profiled(runner)
    assert found["parts"] is None
    assert found["device_busy_seconds"] == pytest.approx(9e-6)
    assert (found["kernel_launches"], found["graph_launches"]) == (2, 1)
    assert [(row["name"], row["count"]) for row in found["top_kernels"]] == [("a", 2), ("b", 1)]
    monkeypatch.setattr(step_profile, "_record", lambda *_: launches)
    ready = Arm(runner, Result(0.0, {}), None, 0, 2, 0.0)
    assert "no work of the GPU" in train_step.where_time_goes(ready, deadline.Deadline(None))["parts_failed"]
    monkeypatch.setattr(step_profile, "_record", lambda *_: events)
    late = train_step.where_time_goes(ready, deadline.Deadline(0.0))
    assert late == {"parts": None, "parts_failed": "the time given by --seconds is over"}
    assert train_step.where_time_goes(ready, deadline.Deadline(None)) | found == found | {
        "cuda_graphs": True,
        "cuda_graph_skips": 2,
    }
