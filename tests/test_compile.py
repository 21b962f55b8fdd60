"""The training step is one graph that is compiled once, with the numbers of the eager one; refusals where it cannot be.

The graphs are run by PyTorch's own operations here ("aot_eager"), which takes seconds; ``test_training_options.py``
has a real run with real compiled programs.
"""

import functools
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from sgmim_fast import ModelConfig, UserError
from sgmim_fast.config import Attention, Backend
from sgmim_fast.masking import mask_indices
from sgmim_fast.tasks.pretrain import PretrainTask
from sgmim_fast.train import compiling
from sgmim_fast.train.compiling import check_compiler, compile_step

ENCODERS: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4},
    "swinv2": {"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4},
    "vit": {"embed_dim": 32, "depths": (2,), "num_heads": (2,), "layer_scale_init": 0.1},
}


@pytest.fixture(autouse=True)
def quick_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch(number: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """As the loader gives it, raw structure maps included; each number has other masks."""
    generator = torch.Generator().manual_seed(number)
    image = torch.randn(2, 3, 64, 96, generator=generator)
    structure = torch.rand(2, 1, 64, 96, generator=generator)
    mask = (torch.rand(2, 6, generator=generator).argsort(1).argsort(1) < 4).view(2, 2, 3)
    masked, visible = mask_indices(mask)
    return {"image": image, "structure": structure, "mask": mask, "masked": masked, "visible": visible,
            "index": torch.arange(2)}  # fmt: skip


def steps(task: PretrainTask) -> list[Tensor]:
    """Losses of four micro-steps with drop path on, then the summed gradients of every parameter."""
    losses = []
    for number in range(4):
        torch.manual_seed(number)
        out = task(batch(number))
        out.loss.backward()
        losses.append(out.loss.detach())
    return losses + [p.grad for p in task.parameters() if p.grad is not None]


def assert_one_graph(task: PretrainTask) -> None:
    """The same numbers as without compiler, from one graph, with no break and no second compilation."""
    expected = steps(task)
    task.zero_grad()
    compile_step(task)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = steps(task)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for a, b in zip(got, expected, strict=True):
        rounding = 1e-5 if b.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * b.abs().max().item())


@pytest.mark.parametrize(
    ("encoder", "attention"),
    [("swin", "auto"), ("swinv2", "auto"), ("vit", "auto"), ("swinv2", "sdpa"), ("vit", "sdpa")],
)
def test_one_graph_for_every_step(encoder: Any, attention: Attention) -> None:
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, image_size=(64, 96), drop_path_rate=0.3, **ENCODERS[encoder])
    assert_one_graph(PretrainTask(config, "torch", attention))


@pytest.mark.parametrize(
    ("backend", "fields"),
    [
        ("auto", {"guidance": "relational-visible"}),
        ("torch", {"guidance": "none", "normalize_target_window": 47}),
        ("reference", {"guidance": "relational-visible"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_one_graph_of_other_models(backend: Backend, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(encoder="vit", image_size=(64, 96), drop_path_rate=0.3, **ENCODERS["vit"], **fields)
    assert_one_graph(PretrainTask(config, backend))


def test_bf16_weights() -> None:
    torch.manual_seed(0)
    config = ModelConfig(encoder="vit", image_size=(64, 96), guidance="none", **ENCODERS["vit"])
    assert_one_graph(PretrainTask(config, "torch").bfloat16())


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    message = r"no C\+\+ compiler is found .*; install g\+\+ \(.*python3-dev\) or set CXX"
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(UserError, match=message) as caught:
        check_compiler(torch.device("cpu"))
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="Triton finds no C compiler; install gcc"):
        check_compiler(torch.device("cuda"))


def test_headers_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for name in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    for device in ("cpu", "cuda"):
        with pytest.raises(UserError, match=r"cannot build its programs \(.*Python\.h.*\); install what is missing"):
            check_compiler(torch.device(device))


def test_a_compiler_that_does_not_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))
    with pytest.raises(UserError, match="does not start"):
        check_compiler(torch.device("cuda"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiler_that_works_is_taken() -> None:
    check_compiler(torch.device("cpu"))
    check_compiler(torch.device("cuda"))
    assert compiling._trial("g++", "c++", "#include <no_such_header>\n") is not None
