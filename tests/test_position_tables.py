"""Position tables for another window or map: the official ways of Swin and BEiT, and what is kept."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from sgmim_fast.position_tables import Resampling, resize_table, square_side

HOW: tuple[Resampling, ...] = ("bicubic", "geometric")


def random_table(source: tuple[int, int], heads: int = 3, extra: int = 0) -> Tensor:
    rows = (2 * source[0] - 1) * (2 * source[1] - 1) + extra
    return torch.randn(rows, heads, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("source,target", [(6, 12), (12, 7), (4, 5)])
def test_bicubic_is_the_interpolation_of_official_swin(source: int, target: int) -> None:
    table = random_table((source, source))
    side, size = 2 * source - 1, 2 * target - 1
    heads_first = table.permute(1, 0).view(1, 3, side, side)
    official = F.interpolate(heads_first, size=(size, size), mode="bicubic").view(3, size * size).permute(1, 0)
    assert torch.equal(resize_table(table, (source, source), (target, target), "bicubic"), official)


# Of the table sin(0.7 i) + 0.01 i, i its rows, by scipy's interp2d(kind="cubic") at BEiT's spread offsets: the middle
# row, which is the one of offset 0, and the sum of all.
SCIPY = {
    (4, 5): (
        [1.05574671, 0.80268126, 0.38108179, -0.15207142, -0.64756703]
        + [-0.72562601, -0.46236095, -0.05102741, 0.32042246],
        24.9695775,
    ),
    (6, 9): (
        [1.26797659, 1.43592409, 1.54181824, 1.55104779, 1.4290015, 1.14485517, 0.69923465, 0.14668327, -0.31652155]
        + [-0.34867196, -0.03104308, 0.41212639, 0.84151609, 1.19038288, 1.4456114, 1.60056099, 1.64859095],
        193.67067334,
    ),
}


@pytest.mark.parametrize("sides", SCIPY)
def test_geometric_is_the_spline_of_beit(sides: tuple[int, int]) -> None:
    source, target = sides
    row = torch.arange((2 * source - 1) ** 2, dtype=torch.float64)
    table = (torch.sin(0.7 * row) + 0.01 * row).unsqueeze(1)
    resized = resize_table(table, (source, source), (target, target), "geometric").view(2 * target - 1, -1)
    middle, total = SCIPY[sides]
    torch.testing.assert_close(resized[target - 1], torch.tensor(middle, dtype=torch.float64), rtol=0, atol=1e-8)
    assert float(resized.sum()) == pytest.approx(total, abs=1e-7)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's indexing
@pytest.mark.parametrize("source,target", [(6, 9), (5, 9), (12, 16)])
def test_geometric_spreads_offsets_as_timm_does(source: int, target: int) -> None:
    """The table of the very places that its rows are spread to becomes that of plain offsets, by cubics or by lines."""
    ratios = torch.linspace(1.001, 3, 2_000_000, dtype=torch.float64)
    sums = sum(ratios**power for power in range(source - 1))
    assert isinstance(sums, Tensor)
    ratio = float(ratios[(sums - (target - 1)).abs().argmin()])  # of the series that reaches the target's last offset
    places = torch.tensor([sum(ratio**power for power in range(step)) for step in range(source)], dtype=torch.float64)
    column = torch.cat((-places.flip(0)[:-1], places)).float()
    table = column.repeat_interleave(2 * source - 1).unsqueeze(1)  # depends on the row alone
    wanted = torch.arange(1.0 - target, target).repeat_interleave(2 * target - 1).unsqueeze(1)
    theirs = resize_rel_pos_bias_table(table, (target, target), tuple(wanted.shape))
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-4)
    ours = resize_table(table, (source, source), (target, target), "geometric")
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", HOW)
def test_what_is_kept(how: Resampling) -> None:
    table = random_table((4, 4), extra=3)
    assert resize_table(table, (4, 4), (4, 4), how) is table
    for target in ((7, 7), (3, 5), (1, 1)):
        resized = resize_table(table, (4, 4), target, how)
        offsets = (2 * target[0] - 1) * (2 * target[1] - 1)
        assert resized.shape == (offsets + 3, 3)
        assert torch.equal(resized[offsets:], table[-3:])  # the class token's
        middle = resized[:offsets].view(2 * target[0] - 1, 2 * target[1] - 1, 3)[target[0] - 1, target[1] - 1]
        torch.testing.assert_close(middle, table[24], rtol=1e-6, atol=1e-6)  # offset 0 stays


@pytest.mark.parametrize("how", HOW)
def test_oblong_tables_turn_with_their_map(how: Resampling) -> None:
    table = random_table((3, 5), extra=3)
    turned = torch.cat((table[:-3].view(5, 9, 3).transpose(0, 1).reshape(-1, 3), table[-3:]))
    resized = resize_table(table, (3, 5), (6, 4), how)[:-3].view(11, 7, 3)
    other = resize_table(turned, (5, 3), (4, 6), how)[:-3].view(7, 11, 3)
    torch.testing.assert_close(resized, other.transpose(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("source", [1, 2, 3])
def test_smallest_windows(how: Resampling, source: int) -> None:
    """Fewer offsets than a cubic has coefficients."""
    resized = resize_table(torch.full(((2 * source - 1) ** 2, 2), 0.25), (source, source), (6, 6), how)
    torch.testing.assert_close(resized, torch.full((121, 2), 0.25))


@pytest.mark.parametrize("how", HOW)
def test_dtype_and_gradient(how: Resampling) -> None:
    table = random_table((4, 4))
    half = resize_table(table.bfloat16(), (4, 4), (6, 6), how)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, resize_table(table.bfloat16().float(), (4, 4), (6, 6), how).bfloat16())
    table.requires_grad_()
    resize_table(table, (4, 4), (6, 6), how).sum().backward()
    assert table.grad is not None
    assert bool((table.grad != 0).any())


def test_windows_by_their_rows() -> None:
    assert [square_side(rows) for rows in (1, 9, 25, 121, 529)] == [1, 2, 3, 6, 12]
    assert [square_side(rows) for rows in (-3, 0, 4, 24, 36, 99)] == [None] * 6
