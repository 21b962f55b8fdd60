"""Window attention and class-token attention on the kernels, against plain PyTorch."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sgmim_fast import ops, reference
from sgmim_fast.errors import UserError
from tests.kernel_cases import DEVICE, DTYPES, assert_as_exact_as_plain, same_bits, uncontiguous

pytestmark = pytest.mark.usefixtures("poisoned")

DRAWN = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def on_kernels(qkv: Tensor, table: Tensor, logit_scale: Tensor | None = None, **others: Any) -> Tensor:
    return ops.window_attention(qkv, table, logit_scale=logit_scale, backend="triton", **others)


def plain(qkv: Tensor, table: Tensor, logit_scale: Tensor | None = None, **others: Any) -> Tensor:
    return reference.window_attention(qkv, table, logit_scale=logit_scale, **others)


def case(
    *, batch: int = 1, rows: int = 1, columns: int = 1, window: int, heads: int, size: int, cosine: bool, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs of a map of rows x columns windows."""
    torch.manual_seed(seed)
    tensors = {
        "qkv": torch.randn(batch, rows * window, columns * window, 3, heads, size, requires_grad=True),
        "table": torch.randn((2 * window - 1) ** 2, heads, requires_grad=True),
    }
    if cosine:
        tensors["logit_scale"] = (1 + 20 * torch.rand(heads)).requires_grad_()
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("window, shift", [(6, 3), (7, 0), (8, 4), (3, 1)])
def test_windows_that_fit_a_tile(window: int, shift: int, cosine: bool, dtype: torch.dtype) -> None:
    tensors = case(rows=2, columns=2, window=window, heads=2, size=32, cosine=cosine)
    assert_as_exact_as_plain(on_kernels, plain, tensors, {"window": window, "shift": shift}, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window, shift, cosine", [(12, 6, False), (10, 3, True)])
def test_larger_windows(window: int, shift: int, cosine: bool, dtype: torch.dtype) -> None:
    tensors = case(window=window, heads=1, size=32, cosine=cosine)
    assert_as_exact_as_plain(on_kernels, plain, tensors, {"window": window, "shift": shift}, dtype=dtype)


def test_window_of_many_tiles() -> None:
    tensors = case(window=20, heads=1, size=16, cosine=False)
    assert_as_exact_as_plain(on_kernels, plain, tensors, {"window": 20, "shift": 0}, dtype=torch.float16)


@pytest.mark.parametrize("window", [4, 9])
def test_one_program_for_many_windows(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgmim_fast.kernels import window_tiles

    monkeypatch.setattr(window_tiles, "PROGRAMS", 1)
    tensors = case(rows=2, window=window, heads=1, size=16, cosine=True)
    assert window_tiles.group_size(2, 1) == 2
    assert_as_exact_as_plain(on_kernels, plain, tensors, {"window": window, "shift": 1}, dtype=torch.float32)


@DRAWN
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 2),
    columns=st.integers(1, 2),
    window=st.integers(2, 8),  # of one token the gradients are 0, and plain PyTorch hits that exactly
    heads=st.sampled_from([1, 3]),
    size=st.sampled_from([8, 24, 32, 64, 96]),
    cosine=st.booleans(),
    strided=st.booleans(),
    data=st.data(),
)
def test_odd_shapes(
    batch: int,
    rows: int,
    columns: int,
    window: int,
    heads: int,
    size: int,
    cosine: bool,
    strided: bool,
    data: st.DataObject,
) -> None:
    shift = data.draw(st.integers(0, window - 1))
    tensors = case(batch=batch, rows=rows, columns=columns, window=window, heads=heads, size=size, cosine=cosine)
    assert_as_exact_as_plain(
        on_kernels, plain, tensors, {"window": window, "shift": shift}, dtype=torch.float32, strided=strided
    )


def test_many_heads() -> None:
    tensors = case(window=2, heads=48, size=16, cosine=True)
    assert_as_exact_as_plain(on_kernels, plain, tensors, {"window": 2, "shift": 0}, dtype=torch.float32)


def test_parameters_of_another_dtype() -> None:
    """Under autocast float32 tables meet 16-bit activations; gradients come in each one's dtype."""
    tensors = case(columns=2, window=4, heads=2, size=16, cosine=True)
    qkv = tensors["qkv"].detach().to(DEVICE, torch.float16).requires_grad_()
    table, scale = (tensors[name].detach().to(DEVICE).requires_grad_() for name in ("table", "logit_scale"))
    out = on_kernels(qkv, table, scale, window=4, shift=1)
    same = on_kernels(qkv, table.half(), scale.half(), window=4, shift=1)
    torch.testing.assert_close(out, same, rtol=1e-2, atol=1e-2)
    gradients = torch.autograd.grad(out.float().square().sum(), (qkv, table, scale))
    assert [gradient.dtype for gradient in gradients] == [torch.float16, torch.float32, torch.float32]


# -- the class token


def class_token_case(grid: tuple[int, int], *, batch: int = 1, heads: int, size: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    return {
        "qkv": torch.randn(batch, 1 + grid[0] * grid[1], 3, heads, size, requires_grad=True),
        "table": torch.randn(rows, heads, requires_grad=True),
    }


def class_token_on_kernels(qkv: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    return ops.class_token_attention(qkv, table, grid, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "grid, batch, strided", [((4, 4), 2, True), ((3, 7), 1, False), ((1, 2), 3, False), ((9, 9), 1, False)]
)
def test_class_token(grid: tuple[int, int], batch: int, strided: bool, dtype: torch.dtype) -> None:
    tensors = class_token_case(grid, batch=batch, heads=2, size=32)
    plain = reference.class_token_attention
    assert_as_exact_as_plain(class_token_on_kernels, plain, tensors, {"grid": grid}, dtype=dtype, strided=strided)


# -- as custom operations


def op_arguments(cosine: bool, strided: bool) -> tuple[Any, ...]:
    """A window that fits a tile; or, without cosine, a class token and a map, which go through all other kernels."""
    from sgmim_fast.kernels import window_tiles

    tensors = case(window=3, heads=2, size=16, cosine=True) if cosine else class_token_case((2, 3), heads=2, size=16)
    tensors = {name: value.detach().to(DEVICE) for name, value in tensors.items()}
    windows = window_tiles.of_map(tensors["qkv"], 3, 1) if cosine else window_tiles.of_class_token((2, 3))
    qkv, bias = tensors["qkv"] if cosine else tensors["qkv"].unsqueeze(1), tensors["table"].t().contiguous()
    if strided:
        qkv, bias = uncontiguous(qkv), uncontiguous(bias)
    scale = tensors["logit_scale"].requires_grad_() if cosine else None
    return qkv.requires_grad_(), bias.requires_grad_(), scale, list(windows)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_opcheck(cosine: bool, strided: bool) -> None:
    from sgmim_fast.kernels import window_attention as kernels

    arguments = op_arguments(cosine, strided)
    torch.library.opcheck(kernels.window_attention_forward, arguments)
    with torch.no_grad():
        out, lse = kernels.window_attention_forward(*arguments)
    dout = torch.randn_like(out)
    backward = (*arguments, out, lse, uncontiguous(dout) if strided else dout)
    backward = tuple(value.detach() if isinstance(value, Tensor) else value for value in backward)
    torch.library.opcheck(kernels.window_attention_backward, backward)


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels take float64 in the interpreter only")
@pytest.mark.parametrize("cosine", [False, True])
def test_gradcheck(cosine: bool) -> None:
    tensors = case(columns=2, window=2, heads=1, size=3, cosine=cosine)
    inputs = [value.detach().double().requires_grad_() for value in tensors.values()]

    def attend(*inputs: Tensor) -> Tensor:
        return on_kernels(*inputs, window=2, shift=1)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels take float64 in the interpreter only")
def test_gradcheck_of_the_class_token() -> None:
    tensors = class_token_case((2, 3), batch=2, heads=1, size=3)
    inputs = [value.detach().double().requires_grad_() for value in tensors.values()]
    assert torch.autograd.gradcheck(lambda *inputs: class_token_on_kernels(*inputs, (2, 3)), inputs, fast_mode=True)


def test_full_graph_compilation() -> None:
    tensors = {name: value.detach().to(DEVICE) for name, value in case(window=3, heads=1, size=16, cosine=True).items()}

    def loss(qkv: Tensor, table: Tensor, logit_scale: Tensor) -> Tensor:
        return on_kernels(2 * qkv, table.exp(), logit_scale, window=3, shift=0).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=False)):
        inputs = [value.clone().requires_grad_() for value in tensors.values()]
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("window", [4, 9])
def test_same_bits_in_two_runs(window: int) -> None:
    tensors = {
        name: value.detach().to(DEVICE) for name, value in case(window=window, heads=1, size=16, cosine=True).items()
    }

    def run() -> tuple[Tensor, ...]:
        inputs = [value.clone().requires_grad_() for value in tensors.values()]
        out = on_kernels(*inputs, window=window, shift=1)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    assert same_bits(run)


class Allocations(TorchDispatchMode):
    """Bytes of the storage of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
        return out


@pytest.mark.parametrize("window, heads", [(6, 4), (12, 4), (30, 4)])
def test_nothing_of_the_size_of_the_scores_is_allocated(
    window: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No N x N scores, no rolled or partitioned copy: the output, the gradient of qkv, and small change."""
    from triton.runtime import KernelInterface

    from sgmim_fast.kernels import window_backward, window_forward, window_tiles

    # What launchers allocate is asked for; kernels allocate nothing.
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **options: None)
    batch, size = 16, 32
    qkv = torch.empty(batch, 2 * window, 2 * window, 3, heads, size, device="meta", dtype=torch.float16)
    bias = torch.empty(heads, (2 * window - 1) ** 2, device="meta")
    windows = window_tiles.of_map(qkv, window, window // 2)
    with Allocations() as forward:
        out, lse = window_forward.launch_forward(qkv, bias, None, windows)
    dout = torch.empty_like(out)
    with Allocations() as backward:
        window_backward.launch_backward(qkv, bias, None, windows, out, lse, dout)
    assert sum(forward.sizes.values()) == out.nbytes + lse.nbytes
    assert lse.nbytes <= out.nbytes / 8
    scores = batch * 4 * heads * window**4 * qkv.element_size()
    beside = [n for n in backward.sizes.values() if n != qkv.nbytes]
    assert len(beside) == len(backward.sizes) - 1
    assert max(beside) < out.nbytes
    assert max(beside) < scores / 2


# -- what the frontend refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 5}, "must divide"),
        ({"shift": 4}, "shift 4"),
        ({"table": torch.zeros(48, 2)}, "table must be"),
        ({"table": torch.zeros(49, 2, dtype=torch.int64)}, "floating-point"),
        ({"table": torch.zeros(49, 2, device="meta")}, "on meta"),
        ({"logit_scale": torch.ones(3)}, "logit_scale must be"),
        ({"qkv": torch.zeros(1, 4, 8, 3, 2, 130)}, "at most 128"),
        ({"qkv": torch.zeros(1, 4, 8, 3, 2)}, "qkv must be"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "qkv": torch.zeros(1, 4, 8, 3, 2, 16),
        "table": torch.zeros(49, 2),
        "window": 4,
        "shift": 1,
    }
    arguments = {
        name: value.to(DEVICE) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in (arguments | change).items()
    }
    with pytest.raises(ValueError, match=message):
        on_kernels(**arguments)


def test_wrong_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        on_kernels(torch.zeros(1, 4, 4, 3, 1, 16, dtype=torch.int32), torch.zeros(49, 1), window=4, shift=0)
    with pytest.raises(UserError, match="not complex64"):
        ops.resolve_backend("triton", torch.zeros(1, dtype=torch.complex64, device=DEVICE))


def test_giant_windows_are_refused() -> None:
    qkv = torch.zeros(1, 65, 65, 3, 1, 16, device="meta")
    with pytest.raises(ValueError, match="at most 64"):
        on_kernels(qkv, torch.zeros(129**2, 1, device="meta"), window=65, shift=0)
