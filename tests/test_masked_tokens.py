"""Rows gathered and scattered by the kernels, against plain PyTorch; cells cut out of pictures."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgmim_fast import ops, reference
from tests.kernel_cases import DEVICE, DTYPES, assert_as_exact_as_plain, same_bits, uncontiguous

pytestmark = pytest.mark.usefixtures("poisoned")

DRAWN = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def distinct(batch: int, count: int, rows: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
    """An index list (B, count) that names each of ``rows`` rows at most once, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, rows, generator=generator).argsort(1)[:, :count].to(DEVICE, dtype).contiguous()


def gather(x: Tensor, index: Tensor) -> Tensor:
    return ops.gather_rows(x, index, backend="triton")


def scatter(values: Tensor, fill: Tensor, index: Tensor, rows: int) -> Tensor:
    return ops.scatter_rows(values, index, fill, rows, backend="triton")


def plain_scatter(values: Tensor, fill: Tensor, index: Tensor, rows: int) -> Tensor:
    return reference.scatter_rows(values, index, fill, rows)


@DRAWN
@given(
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    batch=st.integers(1, 3),
    rows=st.integers(2, 40),
    channels=st.integers(1, 100),
    strided=st.booleans(),
    data=st.data(),
)
def test_drawn_shapes(
    dtype: torch.dtype, index_dtype: torch.dtype, batch: int, rows: int, channels: int, strided: bool, data: Any
) -> None:
    count = data.draw(st.sampled_from([1, rows // 2, rows - 1, rows]))
    index = distinct(batch, count, rows, dtype=index_dtype)
    if strided:
        index = uncontiguous(index)
    x = torch.randn(batch, rows, channels, requires_grad=True)
    others = {"index": index}
    assert_as_exact_as_plain(gather, reference.gather_rows, {"x": x}, others, dtype=dtype, strided=strided)
    tensors = {
        "values": torch.randn(batch, count, channels, requires_grad=True),
        "fill": torch.randn(channels, requires_grad=True),
    }
    others = {"index": index, "rows": rows}
    assert_as_exact_as_plain(scatter, plain_scatter, tensors, others, dtype=dtype, strided=strided)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "count", "channels"), [(36, 22, 1024), (36, 9, 96), (150, 70, 8), (5, 2, 1500)])
def test_what_is_only_moved_keeps_its_bits(rows: int, count: int, channels: int, dtype: torch.dtype) -> None:
    """Shapes of the recipes, index lists longer than a block of them, and more channels than a block."""
    index = distinct(1, count, rows)
    x = torch.randn(1, rows, channels, device=DEVICE).to(dtype).requires_grad_()
    fill = torch.full((channels,), -7.0, device=DEVICE, dtype=dtype, requires_grad=True)
    found = gather(x, index)
    assert torch.equal(found, reference.gather_rows(x, index))
    back = scatter(found, fill, index, rows)
    assert torch.equal(back, reference.scatter_rows(found, index, fill, rows))
    grad = torch.randn_like(back)
    (dx,) = torch.autograd.grad(back, x, grad)
    named = torch.zeros(1, rows, dtype=torch.bool, device=DEVICE).scatter(1, index.long(), True).unsqueeze(-1)
    assert torch.equal(dx, torch.where(named, grad, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_named_twice_gets_the_sum_of_its_gradients(dtype: torch.dtype) -> None:
    index = torch.tensor([[3, 0, 3, 3, 1], [2, 4, 0, 1, 3]], device=DEVICE)
    x = torch.randn(2, 6, 40, requires_grad=True)
    assert_as_exact_as_plain(gather, reference.gather_rows, {"x": x}, {"index": index}, dtype=dtype)


def test_a_table_shared_by_the_batch() -> None:
    """Expanded over the batch, as position tables are: stride 0."""
    index = distinct(3, 4, 9)
    table = torch.randn(1, 9, 48, device=DEVICE)
    results = []
    for backend in ("triton", "torch"):
        leaf = table.clone().requires_grad_()
        out = ops.gather_rows(leaf.expand(3, -1, -1), index, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain)


def test_a_fill_token_in_another_dtype() -> None:
    """Autocast leaves parameters in float32 beside half-precision rows."""
    index = distinct(2, 3, 7)
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(1)
        values = torch.randn(2, 3, 24, device=DEVICE).half().requires_grad_()
        fill = torch.randn(24, device=DEVICE, requires_grad=True)
        out = ops.scatter_rows(values, index, fill, 7, backend=backend)
        results.append((out, *torch.autograd.grad(out, (values, fill), torch.randn_like(out))))
    for mine, plain in zip(*results, strict=True):
        assert mine.dtype == plain.dtype
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-3)


def test_only_the_gradients_that_are_asked_for() -> None:
    index = distinct(1, 2, 5)
    values, fill = torch.randn(1, 2, 16, device=DEVICE), torch.randn(16, device=DEVICE)
    (found,) = torch.autograd.grad(scatter(values.requires_grad_(), fill, index, 5).sum(), values)
    assert torch.equal(found, torch.ones_like(values))
    (found,) = torch.autograd.grad(scatter(values.detach(), fill.requires_grad_(), index, 5).sum(), fill)
    assert torch.equal(found, torch.full_like(fill, 3))


@pytest.mark.parametrize("bad", [-1, 6, 1000, 2**33])
def test_an_index_out_of_range_shows_as_nan(bad: int) -> None:
    """Where the frontend does not look, as it would have to wait for the GPU."""
    from sgmim_fast.kernels import cell_patches, masked_tokens

    index = torch.tensor([[0, bad, 2], [1, 2, 3]], device=DEVICE)
    x = torch.randn(2, 6, 20, device=DEVICE, requires_grad=True)
    out = masked_tokens.gather_rows(x, index)
    wrong = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    wrong[0, 1] = True
    assert torch.equal(out.isnan().all(-1), wrong)
    assert torch.equal(out.isnan().any(-1), wrong)
    (dx,) = torch.autograd.grad(out[~wrong].sum(), x)
    assert torch.equal(dx.sum(2), torch.tensor([[20.0, 0, 20, 0, 0, 0], [0, 20, 20, 20, 0, 0]], device=DEVICE))
    out = masked_tokens.scatter_rows(x.detach()[:, :3], index, x.detach()[0, 0], 6)
    assert torch.equal(out.isnan().all(-1).all(-1), torch.tensor([True, False], device=DEVICE))
    assert not out[1].isnan().any()
    cells = cell_patches.gather_cells(torch.randn(2, 1, 64, 96, device=DEVICE), index)
    assert torch.equal(cells.isnan().flatten(2).all(-1), wrong)


@DRAWN
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    channels=st.integers(1, 3),
    strided=st.booleans(),
    data=st.data(),
)
def test_cells_of_drawn_pictures(
    dtype: torch.dtype, batch: int, rows: int, columns: int, channels: int, strided: bool, data: Any
) -> None:
    index = distinct(batch, data.draw(st.integers(1, rows * columns)), rows * columns)
    picture = torch.randn(batch, channels, 32 * rows, 32 * columns, device=DEVICE).to(dtype)
    if strided:
        picture = uncontiguous(picture)
    out = ops.gather_cells(picture, index, backend="triton")
    assert torch.equal(out, reference.gather_cells(picture, index))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("side", [1, 2])
def test_opcheck(side: int, strided: bool) -> None:
    from sgmim_fast.kernels import masked_tokens as kernels

    def given_as(x: Tensor) -> Tensor:
        return uncontiguous(x) if strided else x

    index = given_as(distinct(2, 3, 6))
    x = given_as(torch.randn(2, 6 * side**2, 12, device=DEVICE))
    values = given_as(torch.randn(2, 3 * side**2, 12, device=DEVICE))
    fill = given_as(torch.randn(12, device=DEVICE))
    rows = x.shape[1]
    torch.library.opcheck(kernels.gather_tokens, (x.clone().requires_grad_(), index, side, 3))
    torch.library.opcheck(kernels.gather_tokens_backward, (values, index, rows, side, 3))
    arguments = (values.clone().requires_grad_(), index, fill.clone().requires_grad_(), rows, side, 3)
    torch.library.opcheck(kernels.scatter_tokens, arguments)
    torch.library.opcheck(kernels.fill_gradient, (x, index, torch.float16, side, 3))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("patch", [4, 32])
def test_opcheck_of_patches(patch: int, strided: bool) -> None:
    from sgmim_fast.kernels import cell_patches

    picture = torch.randn(2, 2, 32, 64, device=DEVICE)
    arguments = (uncontiguous(picture) if strided else picture, distinct(2, 1, 2), patch, torch.float16)
    torch.library.opcheck(cell_patches.gather_patches, arguments)


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels take float64 in the interpreter only")
def test_gradcheck() -> None:
    index = torch.tensor([[2, 0, 2], [1, 3, 0]])
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather(x, index), x, fast_mode=True)
    values = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(3, dtype=torch.float64, requires_grad=True)
    index = distinct(2, 3, 5)
    assert torch.autograd.gradcheck(
        lambda values, fill: scatter(values, fill, index, 5), (values, fill), fast_mode=True
    )


def test_full_graph_compilation() -> None:
    index = distinct(2, 3, 6)
    picture = torch.randn(2, 1, 64, 96, device=DEVICE)
    tensors = [torch.randn(2, 6, 20, device=DEVICE), torch.randn(20, device=DEVICE)]

    def loss(x: Tensor, fill: Tensor) -> Tensor:
        rows = gather(2 * x, index)
        cells = ops.gather_cells(picture, index, backend="triton")
        return (scatter(rows.exp(), fill.exp(), index, 6).square() * cells.abs().mean()).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=False)):
        inputs = [value.clone().requires_grad_() for value in tensors]
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_same_bits_in_two_runs() -> None:
    index = torch.tensor([[3, 3, 1, 3], [0, 5, 0, 2]], device=DEVICE)
    once = distinct(2, 4, 40)
    x, fill = torch.randn(2, 6, 33, device=DEVICE), torch.randn(33, device=DEVICE)

    def run() -> tuple[Tensor, ...]:
        inputs = x.clone().requires_grad_(), fill.clone().requires_grad_()
        out = scatter(gather(inputs[0], index), inputs[1], once, 40)
        return out, *torch.autograd.grad(out.exp().sum(), inputs)

    assert same_bits(run)


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(2, 6, 8, device=DEVICE)
    index = distinct(2, 3, 6)
    with pytest.raises(ValueError, match=r"int32 or int64"):
        gather(x, index.to(torch.uint8))
    with pytest.raises(ValueError, match=r"kernels take floating-point numbers, not torch.int64"):
        gather(torch.zeros(2, 6, 8, dtype=torch.int64, device=DEVICE), index)
    with pytest.raises(ValueError, match=r"on meta"):
        gather(x, index.to("meta"))
    with pytest.raises(ValueError, match=r"no gradient to a picture; detach it, or choose backend"):
        ops.gather_cells(torch.zeros(2, 1, 64, 96, device=DEVICE, requires_grad=True), index, backend="triton")
    with torch.no_grad():
        ops.gather_cells(torch.zeros(2, 1, 64, 96, device=DEVICE, requires_grad=True), index, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_entries_are_named_where_reading_them_costs_nothing(backend: str) -> None:
    if DEVICE == "cuda" and backend == "triton":
        pytest.skip("reading an index list on the GPU would wait for it")
    x = torch.randn(1, 6, 8)
    with pytest.raises(ValueError, match=r"\[0, 6\); it has 0 to 6"):
        ops.gather_rows(x, torch.tensor([[0, 6]]), backend=backend)
    with pytest.raises(ValueError, match=r"\[0, 6\); it has -1 to 2"):
        ops.scatter_rows(x[:, :2], torch.tensor([[2, -1]]), x[0, 0], 6, backend=backend)
    with pytest.raises(ValueError, match=r"names a place twice"):
        ops.scatter_rows(x[:, :2], torch.tensor([[2, 2]]), x[0, 0], 6, backend=backend)
    with pytest.raises(ValueError, match=r"\[0, 2\); it has 2 to 2"):
        ops.gather_cells(torch.zeros(1, 1, 32, 64), torch.tensor([[2]]), backend=backend)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("channels", [1, 33, 64, 96, 128, 192, 768, 1024, 1536, 4096])
def test_tiles_hold_whole_accesses(channels: int, element_size: int) -> None:
    from sgmim_fast.kernels.masked_tokens import list_block, tile

    rows, columns = tile(channels, element_size)
    assert rows & (rows - 1) == columns & (columns - 1) == 0  # powers of two
    assert rows * columns * element_size <= 8192
    assert columns >= min(channels, 64)
    if channels % 64 == 0:
        assert channels % columns == 0  # no lane idles
    for entries in (1, 22, 120, 5000):
        assert 16 <= list_block(entries, rows) <= max(16, 2048 // rows)
