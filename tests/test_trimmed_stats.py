"""The kernels that standardise structure maps, held against a sort."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgmim_fast import ops, reference
from sgmim_fast.kernels import launch
from sgmim_fast.kernels import trimmed_stats as kernels
from tests.kernel_cases import DEVICE, DTYPES, assert_as_exact_as_plain, same_bits, uncontiguous

SAMPLE = kernels.sample


@pytest.fixture(autouse=True)
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter sorts a pair of numbers at a time."""
    if launch.INTERPRETED:
        monkeypatch.setattr(kernels, "sample", lambda n: 16)


def drawn(kind: str, rows: int, n: int, seed: int = 0) -> Tensor:
    """Rows of n values, float32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, n, generator=generator)
    uniform = torch.rand(rows, n, generator=generator)
    rounded = (256 * uniform).floor()
    made = {
        "normal": normal,
        "far from zero": normal + 1e4,
        "constant": torch.full((rows, n), 3.3),
        "8 bits": rounded,
        "few values": (4 * uniform).floor() - 1,
        "sky": torch.where(uniform < 0.3, 0.0, normal.abs()),
        "barely sky": torch.where(uniform < 0.101, 0.0, normal.abs() + 1),
        "two levels": (uniform < 0.5).float(),
        "outliers": torch.where(uniform < 0.05, 1e6, normal),
        "many magnitudes": torch.exp(5 * normal),
        "denormal": normal * 1e-40,
        "both zeros": torch.where(uniform < 0.5, 0.0, -0.0),
        "ramp": torch.arange(n).float().expand(rows, n) / n,
    }
    return made[kind]


KINDS = ["normal", "far from zero", "constant", "8 bits", "few values", "sky", "barely sky", "two levels", "outliers"]
KINDS += ["many magnitudes", "denormal", "both zeros", "ramp"]


def stats(values: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.trimmed_stats(values)


def plain_stats(values: Tensor) -> tuple[Tensor, Tensor]:
    return reference.trimmed_stats(values)


def standardized(maps: Tensor) -> Tensor:
    return ops.standardize_structure(maps, backend="triton")


def plain(maps: Tensor) -> Tensor:
    return ops.standardize_structure(maps, backend="reference")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_a_sort(kind: str) -> None:
    values = {"values": drawn(kind, 2, 5000)}
    assert_as_exact_as_plain(stats, plain_stats, values, dtype=torch.float32)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([kind for kind in KINDS if kind != "denormal"]),
    maps=st.sampled_from([(1, 1), (1, 2), (3, 1)]),
    sides=st.tuples(st.integers(2, 30), st.integers(2, 30)),
    seed=st.integers(0, 99),
    strided=st.booleans(),
)
def test_any_map(
    dtype: torch.dtype, kind: str, maps: tuple[int, int], sides: tuple[int, int], seed: int, strided: bool
) -> None:
    values = drawn(kind, maps[0] * maps[1], sides[0] * sides[1], seed).view(*maps, *sides)
    if dtype == torch.float16:
        values = values.clamp(-100, 100)  # variances that float16 holds, for the plain operation's sake
    assert_as_exact_as_plain(standardized, plain, {"maps": values}, dtype=dtype, strided=strided, slack=2)


@pytest.mark.parametrize("n", [3, 10, 11, 499, 4096, 4097])
def test_ranks_are_those_of_the_sort(n: int) -> None:
    """Of whole numbers the sum is exact, so one wrong rank or one tie too many changes it."""
    values = torch.randint(0, 40, (2, n), generator=torch.Generator().manual_seed(n)).float() ** 2
    mean, variance = stats(values.to(DEVICE))
    kept = values.double().sort(1).values[:, int(0.1 * n) : int(0.9 * n)]
    assert torch.equal(mean.cpu(), kept.mean(1).float())
    torch.testing.assert_close(variance.cpu().double(), kept.var(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("left", [0.0, 7.0])
def test_memory_left_by_others_does_not_count(monkeypatch: pytest.MonkeyPatch, left: float) -> None:
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: allocate(*args, **options).fill_(left))
    values = drawn("normal", 2, 5000).to(DEVICE)
    for found, expected in zip(stats(values), plain_stats(values), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_sample_that_leads_astray() -> None:
    """Every sampled value is an outlier, so both order statistics are missed at first."""
    n = 4096
    size = kernels.sample(n) * kernels.WARPS
    sampled = (torch.arange(size) * 2654435769 % 2**32 * n) >> 32
    for outlier in (100.0, -100.0):
        values = drawn("normal", 1, n)
        values[0, sampled] = outlier
        for found, expected in zip(stats(values.to(DEVICE)), plain_stats(values.double()), strict=True):
            torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=1e-8)


def test_the_sample_of_a_real_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "sample", SAMPLE)
    values = drawn("normal", 1, 96 * 96).to(DEVICE)
    for found, expected in zip(stats(values), plain_stats(values), strict=True):
        torch.testing.assert_close(found, expected)


def test_sample_sizes() -> None:
    assert [SAMPLE(n) for n in (3, 1024, 192 * 192, 224 * 224, 384 * 384, 768 * 768)] == [32, 32, 128, 128, 256, 256]


def test_16_bits_are_summed_in_32() -> None:
    values = torch.full((1, 1000), 60000.0, dtype=torch.float16, device=DEVICE)
    values[:, ::2] = 50000
    mean, variance = stats(values)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean, torch.tensor([55000.0], device=DEVICE), rtol=1e-3, atol=0)
    torch.testing.assert_close(variance, torch.tensor([2.5e7], device=DEVICE), rtol=1e-2, atol=0)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("function", [stats, reference.trimmed_stats, reference.trimmed_stats_by_selection])
def test_what_is_no_number_shows(function: Callable[[Tensor], tuple[Tensor, Tensor]], odd: float) -> None:
    """One such value is enough, even where it would have been trimmed."""
    values = drawn("normal", 3, 700).to(DEVICE)
    values[1, 699] = odd
    for found, expected in zip(function(values), plain_stats(values[[0, 2]]), strict=True):
        assert found[1].isnan()
        torch.testing.assert_close(found[[0, 2]], expected)


def test_a_map_with_a_nan_becomes_nan_as_a_whole() -> None:
    maps = drawn("normal", 4, 36).view(2, 2, 6, 6).to(DEVICE)
    maps[1, 0, 2, 3] = torch.nan
    for backend in ("reference", "torch", "triton"):
        lost = ops.standardize_structure(maps, backend=backend).isnan().flatten(2)
        assert lost.all(2).tolist() == lost.any(2).tolist() == [[False, False], [True, False]]


def test_two_runs_give_the_same_bits() -> None:
    values = drawn("normal", 2, 5000).to(DEVICE)
    assert same_bits(lambda: stats(values))


@pytest.mark.parametrize("strided", [False, True])
def test_operators_keep_their_promises(strided: bool) -> None:
    values = drawn("normal", 2, 100).to(DEVICE)
    values = uncontiguous(values) if strided else values
    torch.library.opcheck(kernels.trimmed_stats, (values,))
    torch.library.opcheck(kernels.standardize, (values, *stats(values)))


def test_compiled_in_one_graph() -> None:
    maps = drawn("normal", 2, 100).view(2, 1, 10, 10).to(DEVICE)
    assert torch.equal(torch.compile(standardized, fullgraph=True)(maps), standardized(maps))


@pytest.mark.parametrize(
    "maps, message",
    [
        (torch.zeros(1, 4, 4), r"maps must be float \(B, C, H, W\)"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int32), "maps must be float"),
        (torch.zeros(1, 1, 1, 2), "3 to 16777216 pixels"),
        (torch.zeros(1, 1, 1, 1).expand(1, 1, 4097, 4096), "3 to 16777216 pixels"),
        (torch.zeros(1, 1, 4, 4, requires_grad=True), "no gradient"),
    ],
)
def test_wrong_maps_are_refused(maps: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        standardized(maps.to(DEVICE))


def test_float64_runs_in_the_interpreter_only() -> None:
    maps = drawn("normal", 1, 36).view(1, 1, 6, 6).double().to(DEVICE)

    def run() -> Any:
        return standardized(maps)

    if launch.INTERPRETED:
        torch.testing.assert_close(run(), plain(maps), rtol=1e-12, atol=1e-12)
    else:
        with pytest.raises(ValueError, match="not float64"):
            run()
