"""The kernels of the masked loss, held against the plain operation."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgmim_fast import ops, reference
from sgmim_fast.kernels import launch
from sgmim_fast.kernels import masked_l1 as kernels
from tests.kernel_cases import DEVICE, DTYPES, assert_as_exact_as_plain, same_bits, uncontiguous

CELL = 32


def masked_l1(prediction: Tensor, picture: Tensor, index: Tensor) -> Tensor:
    return ops.masked_l1(prediction, picture, index, backend="triton")


def case(
    batch: int = 2, grid: tuple[int, int] = (2, 3), cells: int = 2, side: int = 1, channels: int = 3, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Prediction and picture, and the index: ``cells`` cells of each sample, in no order."""
    generator = torch.Generator().manual_seed(seed)
    values = channels * (CELL // side) ** 2
    tensors = {
        "prediction": torch.randn(batch, cells, side, side, values, generator=generator).requires_grad_(),
        "picture": torch.randn(batch, channels, grid[0] * CELL, grid[1] * CELL, generator=generator),
    }
    index = torch.stack([torch.randperm(grid[0] * grid[1], generator=generator)[:cells] for _ in range(batch)])
    return tensors, {"index": index.to(DEVICE, torch.int32)}


def arguments(*, dtype: torch.dtype = torch.float32, **shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, others = case(**shape)
    prediction, picture = (x.detach().to(DEVICE, dtype) for x in tensors.values())
    return prediction.requires_grad_(), picture, others["index"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape(dtype: torch.dtype, data: st.DataObject) -> None:
    grid = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), "grid")
    total = grid[0] * grid[1]
    tensors, others = case(
        batch=data.draw(st.sampled_from([1, 2, 3]), "batch"),
        grid=grid,
        cells=data.draw(st.sampled_from(sorted({1, max(1, total - 1), total})), "cells"),
        side=data.draw(st.sampled_from([1, 2, 4, 32]), "side"),
        channels=data.draw(st.sampled_from([1, 2, 3, 5, 8]), "channels"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    strided = data.draw(st.booleans(), "strided")
    assert_as_exact_as_plain(masked_l1, reference.masked_l1, tensors, others, dtype=dtype, strided=strided)


@pytest.mark.usefixtures("poisoned")
def test_a_prediction_of_16_bits_against_a_picture_of_32() -> None:
    def with_wide_picture(function: Any) -> Any:
        def widened(prediction: Tensor, picture: Tensor, index: Tensor) -> Tensor:
            return function(prediction, picture.to(torch.promote_types(picture.dtype, torch.float32)), index)

        return widened

    tensors, others = case(side=2)
    for dtype in DTYPES[1:]:
        assert_as_exact_as_plain(
            with_wide_picture(masked_l1), with_wide_picture(reference.masked_l1), tensors, others, dtype=dtype
        )
        prediction, picture, index = arguments(side=2)
        prediction = prediction.detach().to(dtype).requires_grad_()
        loss = masked_l1(prediction, picture, index)
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss, prediction)[0].dtype == dtype


def test_a_sum_beyond_float16_is_no_infinity() -> None:
    prediction, picture, index = arguments(dtype=torch.float16, cells=6, batch=3)
    loss = masked_l1(prediction + 8, picture, index)
    torch.testing.assert_close(loss, torch.tensor(8.0, dtype=torch.float16, device=DEVICE), rtol=0.02, atol=0)


def test_equal_values_have_no_gradient() -> None:
    prediction, picture, index = arguments(batch=1, cells=1, channels=1)
    target = reference.gather_cells(picture, index).reshape(prediction.shape)
    with torch.no_grad():
        prediction.copy_(target)
        prediction[0, 0, 0, 0, :3] += torch.tensor([0.0, 1.0, -1.0], device=DEVICE)
    (gradient,) = torch.autograd.grad(masked_l1(prediction, picture, index), prediction)
    assert gradient[0, 0, 0, 0, :3].sign().tolist() == [0, 1, -1]
    assert gradient.count_nonzero() == 2


def test_long_lists_of_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """More partial sums than the last kernel reads at once."""
    monkeypatch.setattr(kernels, "partials_block", lambda programs: 4)
    prediction, picture, index = arguments(cells=5)
    torch.testing.assert_close(masked_l1(prediction, picture, index), reference.masked_l1(prediction, picture, index))


def test_no_cells_no_loss() -> None:
    prediction, picture, index = arguments(cells=0)
    assert masked_l1(prediction, picture, index).item() == 0


def test_launch_choices() -> None:
    assert [kernels.runs_of_a_program(channels) for channels in (1, 2, 3, 4, 5, 6, 8)] == [1, 2, 3, 4, 1, 3, 4]
    assert [kernels.partials_block(programs) for programs in (1, 2816, 100_000)] == [128, 4096, 8192]


@pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels take float64 through the interpreter only")
@pytest.mark.parametrize("side, channels", [(1, 1), (16, 2)])
def test_gradient_by_differences(side: int, channels: int) -> None:
    prediction, picture, index = arguments(
        dtype=torch.float64, batch=1, grid=(1, 2), cells=1, side=side, channels=channels
    )
    assert torch.autograd.gradcheck(lambda x: masked_l1(x, picture, index), prediction, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    prediction, picture, index = arguments(dtype=dtype, side=2)

    def run() -> tuple[Tensor, ...]:
        loss = masked_l1(prediction, picture, index)
        return loss, *torch.autograd.grad(loss, prediction)

    assert same_bits(run)


@pytest.mark.parametrize("strided", [False, True])
def test_operators_keep_their_promises(strided: bool) -> None:
    prediction, picture, index = arguments(side=2)
    if strided:
        prediction, picture, index = (uncontiguous(x.detach()) for x in (prediction, picture, index))
        prediction.requires_grad_()
    torch.library.opcheck(kernels.masked_l1, (prediction, picture, index))
    upstream = torch.tensor(2.0, device=DEVICE)
    torch.library.opcheck(kernels.masked_l1_backward, (upstream, prediction.detach(), picture, index))


def test_compiled_in_one_graph() -> None:
    prediction, picture, index = arguments(side=2)

    def run(x: Tensor) -> Tensor:
        return 3 * masked_l1(2 * x, picture, index)

    compiled = torch.compile(run, fullgraph=True)
    expected, found = run(prediction), compiled(prediction)
    assert torch.equal(found, expected)
    (wanted,), (gradient,) = (torch.autograd.grad(loss, prediction) for loss in (expected, found))
    assert torch.equal(gradient, wanted)


def test_a_cell_that_is_not_there_shows() -> None:
    """Where the frontend does not look: on a GPU, and in a compiled graph."""
    for wrong in (-1, 6, 2**31 - 1):
        prediction, picture, index = arguments()
        index[1, 0] = wrong
        loss = kernels.masked_l1(prediction, picture, index)
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, prediction)
        assert gradient[1, 0].isnan().all()
        assert gradient[0].isfinite().all()
        assert gradient[1, 1].isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction": torch.zeros(2, 2, 3072)}, r"prediction must be \(B, K, t, t"),
        ({"prediction": torch.zeros(2, 2, 0, 0, 3072)}, "t dividing 32"),
        ({"prediction": torch.zeros(2, 2, 3, 3, 3072)}, "t dividing 32"),
        ({"prediction": torch.zeros(2, 2, 1, 2, 3072)}, "t dividing 32"),
        ({"prediction": torch.zeros(2, 2, 2, 2, 3072)}, "3072 channels; 3 x 16 x 16 are needed"),
        ({"prediction": torch.zeros(2, 1, 1, 1, 3072)}, r"is of \(2, 1\) cells, but index names \(2, 2\)"),
        ({"picture": torch.zeros(2, 3, 40, 64)}, "multiples of 32"),
        ({"picture": torch.zeros(2, 3, 64, 96, dtype=torch.int32)}, "floating-point"),
        ({"picture": torch.zeros(2, 3, 64, 96, requires_grad=True)}, "no gradient to a picture"),
        ({"index": torch.zeros(2, 2)}, "index must be integers"),
        ({"prediction": torch.zeros(2, 2, 1, 1, 3072, device="meta")}, "all tensors must be on"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Tensor], message: str) -> None:
    given = dict(zip(("prediction", "picture", "index"), arguments(), strict=True))
    given |= {name: value if value.is_meta else value.to(DEVICE) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        masked_l1(**given)


@pytest.mark.parametrize("wrong", [-1, 6])
def test_an_index_on_the_cpu_is_read(wrong: int) -> None:
    prediction, picture, index = (x.detach().cpu() for x in arguments())
    index[1, 0] = wrong
    with pytest.raises(ValueError, match=r"index must be in \[0, 6\)"):
        ops.masked_l1(prediction, picture, index)
