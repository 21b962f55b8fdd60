"""A library's fused attention computes what the plain formula computes, to every gradient, or says why it cannot."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgmim_fast import ModelConfig, UserError, attention, create_model, ops, reference
from sgmim_fast.config import Attention

# Stands in for the package: its documented formula, and what its source refuses.
FAKE_XFORMERS = """
import torch

def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    if query.shape[-1] % 2:
        raise NotImplementedError("No operator found\\nquery.shape[-1] % 2 != 0")
    for x in (query, key, value):
        assert x.dim() == 4 and x.stride(-1) == 1
    assert p == 0.0 and scale is not None
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    if attn_bias is not None:
        assert attn_bias.shape == logits.shape and attn_bias.dtype == query.dtype
        assert attn_bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        logits = logits + attn_bias
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)
"""
LIBRARIES = ("sdpa", "xformers")


@pytest.fixture
def fake_xformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").touch()
    (tmp_path / "xformers" / "ops.py").write_text(FAKE_XFORMERS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("xformers", "xformers.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(attention, "_xformers_objection", lambda device, dtype: None)
    yield
    for name in ("xformers", "xformers.ops"):
        sys.modules.pop(name, None)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def assert_same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and the gradients of all ``inputs``."""
    out, expected = ours(*inputs), plain(*inputs)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(expected)
    got = torch.autograd.grad(out, inputs, cotangent)
    for number, (a, b) in enumerate(zip(got, torch.autograd.grad(expected, inputs, cotangent), strict=True)):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, n=number: f"input {n}: {text}")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("shift", "window", "heads"), [(0, 3, 1), (1, 3, 3), (2, 4, 2), (0, 4, 2)])
def test_window_attention(library: str, cosine: bool, shift: int, window: int, heads: int, fake_xformers: None) -> None:
    torch.manual_seed(0)
    inputs = [random(2, 3 * window, 2 * window, 3, heads, 4), random((2 * window - 1) ** 2, heads)]
    if cosine:
        inputs.append((1 + torch.rand(heads, dtype=torch.float64)).requires_grad_())

    def run(attention: str) -> Callable[..., Tensor]:
        def call(qkv: Tensor, table: Tensor, scale: Tensor | None = None) -> Tensor:
            return ops.window_attention(qkv, table, window, shift, scale, backend="torch", attention=attention)

        return call

    assert_same(run(library), run("auto"), *inputs)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("grid", "heads"), [((2, 3), 2), ((3, 5), 1)])
def test_class_token_attention(library: str, grid: tuple[int, int], heads: int, fake_xformers: None) -> None:
    torch.manual_seed(0)
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    inputs = random(2, 1 + grid[0] * grid[1], 3, heads, 4), random(rows, heads)
    assert_same(
        lambda qkv, table: ops.class_token_attention(qkv, table, grid, backend="torch", attention=library),
        lambda qkv, table: reference.class_token_attention(qkv, table, grid),
        *inputs,
    )


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("count", [0, 1, 22])
def test_guidance_attention(library: str, count: int, fake_xformers: None) -> None:
    torch.manual_seed(0)
    inputs = [random(2, 5, 3, 4), random(2, 7, 3, 4), random(2, 7, 3, 4)]
    if count:
        inputs += [random(3, 4), random(3, 4)]
    nulls = () if count else (None, None)
    assert_same(
        lambda *x: ops.guidance_attention(*x, *nulls, count=count, backend="torch", attention=library),
        lambda *x: reference.guidance_attention(*x, *nulls, count=count),
        *inputs,
    )


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_models(encoder: Any) -> None:
    """Loss and the gradient of every parameter, against the reference backend."""
    shape: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 4}
    if encoder == "vit":
        shape = {"embed_dim": 32, "depths": (2,), "num_heads": (2,)}
    torch.manual_seed(0)
    model = create_model(ModelConfig(encoder=encoder, image_size=(64, 96), **shape)).double()
    with torch.no_grad():  # away from the symmetric start: zero norms would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    image, structure = (torch.randn(2, channels, 64, 96, dtype=torch.float64) for channels in (3, 1))
    mask = (torch.rand(2, 6).argsort(1).argsort(1) < 4).view(2, 2, 3)

    def run(backend: Any, attention: Any) -> dict[str, Tensor]:
        model.set_backend(backend)
        model.set_attention(attention)
        model.zero_grad()
        loss = model(image, structure, mask).loss
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return found | {"loss": loss.detach()}

    expected = run("reference", "auto")
    got = run("torch", "sdpa")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-9 * value.abs().max().item(), msg=name)


def tiny(**options: Any) -> Any:
    shape: dict[str, Any] = {"embed_dim": 32, "depths": (1,), "num_heads": (2,), "image_size": 64}
    return create_model(ModelConfig(encoder="vit", **shape), **options)


def test_refusals_leave_the_model_as_it_was() -> None:
    with pytest.raises(UserError, match=r"attention 'flash' is unknown; choose one of auto, sdpa, xformers"):
        tiny(attention="flash")
    with pytest.raises(UserError, match=r'"xformers" cannot run here: it needs a GPU.*on the CPU'):
        tiny(attention="xformers")
    with pytest.raises(UserError, match='cannot replace what backend "reference" computes'):
        tiny(backend="reference", attention="sdpa")
    model = tiny(backend="torch", attention="sdpa")
    with pytest.raises(UserError, match='cannot replace what backend "reference" computes'):
        model.set_backend("reference")
    assert (model.backend, model.attention) == ("torch", "sdpa")
    assert {module.attention for module in model.modules() if hasattr(module, "attention")} == {"sdpa"}
    with pytest.raises(UserError, match="needs a GPU"):
        model.set_attention("xformers")
    assert model.attention == "sdpa"


def check(library: Attention, device: str, dtype: torch.dtype = torch.float32) -> None:
    attention.check_attention(library, "torch", torch.device(device), dtype)


def test_xformers_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    attention._xformers_objection.cache_clear()
    with pytest.raises(UserError, match="it takes float32, float16 and bfloat16, not float64"):
        check("xformers", "cuda", torch.float64)
    monkeypatch.setitem(sys.modules, "xformers", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"it is not installed; install xformers .* or choose \"auto\" or \"sdpa\""):
        check("xformers", "cuda")
    check("sdpa", "cpu", torch.float64)
    attention._xformers_objection.cache_clear()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "raise OSError('libcudart.so.11.0: cannot open\\nmore')",
            r"cannot be imported \(libcudart.so.11.0: cannot open\)",
        ),
        ("import a_module_that_is_not_there", r"cannot be imported \(No module named 'a_module_that_is_not_there'\)"),
        ("", "its attention is missing"),
    ],
)
def test_a_broken_xformers_is_named(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").touch()
    (tmp_path / "xformers" / "ops.py").write_text(content)
    attention._xformers_objection.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("xformers", "xformers.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=message) as caught:
        check("xformers", "cuda")
    assert "\n" not in str(caught.value)
    attention._xformers_objection.cache_clear()
    for name in ("xformers", "xformers.ops"):
        sys.modules.pop(name, None)


def test_a_shape_without_a_kernel_is_named(fake_xformers: None) -> None:
    q = random(1, 2, 1, 3)
    with pytest.raises(UserError, match=r"no kernel for heads of 3 channels in float64"):
        ops.guidance_attention(q, q, q, attention="xformers", backend="torch")


def xformers_runs() -> bool:
    try:
        check("xformers", "cuda" if torch.cuda.is_available() else "cpu")
    except UserError:
        return False
    return True


@pytest.mark.skipif(not xformers_runs(), reason="needs xformers and a GPU")
@pytest.mark.parametrize("shift", [0, 3])
def test_xformers_itself(shift: int) -> None:
    """Its own kernels, in bf16 and fp32, beside the plain formula in the same dtype, both against float64."""
    torch.manual_seed(0)
    qkv, table = torch.randn(2, 12, 18, 3, 4, 32, device="cuda"), torch.randn(121, 4, device="cuda")

    def run(dtype: torch.dtype, attention: str) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (qkv.bfloat16(), table.bfloat16())]
        out = ops.window_attention(*inputs, 6, shift, backend="torch", attention=attention)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out) * out.detach())]

    truth = run(torch.float64, "auto")
    for dtype in (torch.float32, torch.bfloat16):
        for true, usual, got in zip(truth, run(dtype, "auto"), run(dtype, "xformers"), strict=True):
            usual_error, error = ((x.double() - true).abs().max().item() for x in (usual, got))
            assert error <= 2 * usual_error + torch.finfo(dtype).eps * true.abs().max().item()
