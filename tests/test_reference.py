"""The plain operations against slow definitions written out, and against each other."""

import pytest
import torch
import torch.nn.functional as F

from sgmim_fast import ops, reference


def test_rows_make_a_round_trip() -> None:
    x = torch.randn(2, 7, 5)
    index = torch.tensor([[0, 3, 6], [1, 2, 4]], dtype=torch.int32)
    fill = torch.full((5,), -1.0)
    rows = ops.gather_rows(x, index)
    assert torch.equal(rows[1, 2], x[1, 4])
    back = ops.scatter_rows(rows, index, fill, 7)
    assert torch.equal(back[0, 3], x[0, 3])
    assert torch.equal(back[0, 1], fill)
    assert torch.equal(ops.gather_rows(back, index), rows)


def test_cells_are_the_32_pixel_squares() -> None:
    picture = torch.arange(2 * 2 * 64 * 96.0).view(2, 2, 64, 96)
    cells = ops.gather_cells(picture, torch.tensor([[0, 5], [1, 3]]))
    assert torch.equal(cells[0, 1], picture[0, :, 32:64, 64:96])
    assert torch.equal(cells[1, 0], picture[1, :, :32, 32:64])


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("cosine", [False, True])
def test_window_attention_against_its_definition(shift: int, cosine: bool) -> None:
    """Token by token: who shares a window after the shift, from the same region, attends."""
    torch.manual_seed(0)
    height, width, window, heads, size = 8, 12, 4, 2, 3
    qkv = torch.randn(1, height, width, 3, heads, size, dtype=torch.float64)
    table = torch.randn((2 * window - 1) ** 2, heads, dtype=torch.float64)
    scale = torch.tensor([3.0, 5.0], dtype=torch.float64) if cosine else None
    out = ops.window_attention(qkv, table, window, shift, scale)

    def place(position: int, side: int) -> tuple[int, int, int]:
        """(window, region, offset in the window) of a row or column."""
        moved = (position - shift) % side
        region = 0 if moved < side - window else 1 if moved < side - shift else 2
        return moved // window, region, moved % window

    for r, c in ((0, 0), (3, 5), (7, 11), (4, 1)):
        query = [place(r, height), place(c, width)]
        for head in range(heads):
            logits, values = [], []
            for i in range(height):
                for j in range(width):
                    key = [place(i, height), place(j, width)]
                    if any(q[0] != k[0] or (shift and q[1] != k[1]) for q, k in zip(query, key, strict=True)):
                        continue
                    q, k, v = qkv[0, r, c, 0, head], qkv[0, i, j, 1, head], qkv[0, i, j, 2, head]
                    if scale is None:
                        logit = q @ k / size**0.5
                    else:
                        logit = scale[head] * F.cosine_similarity(q, k, dim=0)
                    down, right = (q_[2] - k_[2] + window - 1 for q_, k_ in zip(query, key, strict=True))
                    logits.append(logit + table[down * (2 * window - 1) + right, head])
                    values.append(v)
            expected = torch.stack(logits).softmax(0) @ torch.stack(values)
            torch.testing.assert_close(out[0, r, c].view(heads, size)[head], expected, rtol=1e-9, atol=1e-12)


def test_null_token_stands_for_equal_tokens() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 4, dtype=torch.float64) for n in (5, 6, 6))
    null_k, null_v = torch.randn(2, 3, 4, dtype=torch.float64)
    repeated = (torch.cat((x, null.expand(2, 7, 3, 4)), 1) for x, null in ((k, null_k), (v, null_v)))
    expected = ops.guidance_attention(q, *repeated)
    torch.testing.assert_close(ops.guidance_attention(q, k, v, null_k, null_v, 7), expected, rtol=1e-12, atol=1e-12)
    without = ops.guidance_attention(q, k, v, null_k, null_v, 0)
    torch.testing.assert_close(without, ops.guidance_attention(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize(
    "rows",
    [
        torch.randn(4, 1000, dtype=torch.float64),
        torch.randint(0, 5, (4, 1000)).double(),  # ties at both bounds
        torch.full((2, 50), 3.0, dtype=torch.float64),  # constant
        torch.cat((torch.zeros(1, 95), torch.ones(1, 5)), 1).double(),  # all kept values equal
        torch.cat((torch.zeros(1, 50), torch.ones(1, 50)), 1).double(),  # two values, both kept
        torch.randn(3, 37, dtype=torch.float64),  # a count that 10 does not divide
    ],
    ids=["random", "ties", "constant", "outliers", "two-valued", "odd-count"],
)
def test_trimmed_statistics_without_sorting(rows: torch.Tensor) -> None:
    for found, expected in zip(reference.trimmed_stats_by_selection(rows), reference.trimmed_stats(rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_standardised_maps_keep_their_outliers() -> None:
    maps = torch.randn(2, 1, 64, 64)
    maps[0, 0, 0, 0] = 1e4
    out = ops.standardize_structure(maps)
    kept = maps[0].flatten().sort().values[int(0.1 * 4096) : int(0.9 * 4096)]
    expected = (1e4 - kept.mean()) / (kept.var() + 1e-6).sqrt()
    torch.testing.assert_close(out[0, 0, 0, 0], expected)
    torch.testing.assert_close(ops.standardize_structure(maps, backend="reference"), out)


def test_local_normalisation_against_its_definition() -> None:
    picture = torch.randn(1, 2, 9, 7, dtype=torch.float64)
    out = reference.local_normalize(picture, 5)
    for r, c in ((0, 0), (4, 3), (8, 6), (1, 5)):
        window = picture[:, :, max(r - 2, 0) : r + 3, max(c - 2, 0) : c + 3].flatten(2)
        expected = (picture[:, :, r, c] - window.mean(2)) / (window.var(2) + 1e-6).sqrt()
        torch.testing.assert_close(out[:, :, r, c], expected, rtol=1e-9, atol=1e-12)


def test_constant_tensors_are_kept_while_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(side: int) -> torch.Tensor:
        return reference.shifted_region_mask(side, side, 4, 2, torch.device("cpu"))

    assert mask(12) is mask(12)
    monkeypatch.setattr(reference, "KEPT_BYTES", mask(12).nbytes - 1)
    mask(44)  # counted when one is added; no other test asks for it
    assert mask(12) is not mask(12)
    assert mask(8) is mask(8)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="index must be integers"):
        ops.gather_rows(torch.zeros(2, 3, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="window 4 must divide"):
        ops.window_attention(torch.zeros(1, 6, 8, 3, 1, 2), torch.zeros(49, 1), 4, 0)
    with pytest.raises(ValueError, match="multiples of 32"):
        ops.gather_cells(torch.zeros(1, 3, 40, 64), torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="null_k and null_v"):
        ops.guidance_attention(*(torch.zeros(1, 2, 3, 4) for _ in range(3)), count=3)
