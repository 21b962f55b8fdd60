"""The kernels of cross-attention with a counted null token, held against the plain operation."""

from typing import Any

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgmim_fast import ops, reference
from sgmim_fast.kernels import guidance_attention as kernels
from sgmim_fast.kernels import launch
from tests.kernel_cases import DEVICE, DTYPES, assert_as_exact_as_plain, same_bits, uncontiguous

SMALL_TILES = kernels.Blocks(queries=16, keys=16, warps=1, stages=1)
"""Tiles that small cases need several of."""


def attention(*args: Any, **options: Any) -> Tensor:
    return ops.guidance_attention(*args, **options, backend="triton")


def case(
    batch: int = 2, queries: int = 5, keys: int = 7, heads: int = 2, size: int = 16, null: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "q": (batch, queries, heads, size),
        "k": (batch, keys, heads, size),
        "v": (batch, keys, heads, size),
    } | ({"null_k": (heads, size), "null_v": (heads, size)} if null else {})
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def arguments(*, dtype: torch.dtype = torch.float32, **shape: Any) -> list[Tensor]:
    return [x.detach().to(DEVICE, dtype).requires_grad_() for x in case(**shape).values()]


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return torch.autograd.grad(out, inputs, upstream)


@pytest.fixture(params=["chosen tiles", "small tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small tiles":
        monkeypatch.setattr(kernels, "query_blocks", lambda *args: SMALL_TILES)
        monkeypatch.setattr(kernels, "key_blocks", lambda *args: SMALL_TILES)


@pytest.mark.usefixtures("poisoned", "tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape(dtype: torch.dtype, data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([0, 1, 14]), "count")
    tensors = case(
        batch=data.draw(st.sampled_from([1, 3]), "batch"),
        queries=data.draw(st.sampled_from([1, 14, 16, 20]), "queries"),
        keys=data.draw(st.sampled_from([1, 15, 16, 22, 33]), "keys"),
        heads=data.draw(st.sampled_from([1, 3]), "heads"),
        size=data.draw(st.sampled_from([8, 16, 24, 64]), "size"),
        null=count > 0,
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    strided = data.draw(st.booleans(), "strided")
    # Sums over so few numbers err by chance: four roundings more.
    assert_as_exact_as_plain(
        attention, reference.guidance_attention, tensors, {"count": count}, dtype=dtype, strided=strided, slack=4
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "size"),
    [
        (2, 14, 22, 2, 128),  # Swin-B
        (1, 14, 22, 2, 192),  # Swin-L
        (1, 76, 120, 1, 96),  # ViT-B
        (1, 58, 86, 1, 64),
        (1, 2, 5, 48, 32),
        (1, 35, 1, 2, 96),
        (1, 20, 20, 1, 256),
    ],
)
def test_shapes_of_recipes(dtype: torch.dtype, batch: int, queries: int, keys: int, heads: int, size: int) -> None:
    tensors = case(batch, queries, keys, heads, size)
    assert_as_exact_as_plain(attention, reference.guidance_attention, tensors, {"count": queries}, dtype=dtype, slack=4)


@pytest.mark.usefixtures("tiles")
def test_null_token_stands_for_equal_tokens() -> None:
    q, k, v, null_k, null_v = arguments(queries=20, keys=17)
    equal_k, equal_v = (x.expand(len(q), 6, -1, -1) for x in (null_k, null_v))
    inputs = [q, k, v, null_k, null_v]
    spelled = reference.guidance_attention(q, torch.cat((k, equal_k), 1), torch.cat((v, equal_v), 1))
    found = attention(*inputs, 6)
    torch.testing.assert_close(found, spelled)
    for mine, true in zip(gradients(found, inputs), gradients(spelled, inputs), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_large_logits_and_counts_stay_finite(offset: float) -> None:
    """Logits far from 0, to both sides, and a count beyond float16."""
    inputs = arguments(queries=20, keys=17)
    with torch.no_grad():
        inputs[0][..., 0] = 4.0
        inputs[1][..., 0] = offset
        inputs[3][..., 0] = offset
    for dtype in DTYPES[:2]:
        moved = [x.detach().to(dtype).requires_grad_() for x in inputs]
        exact = [x.detach().double().requires_grad_() for x in moved]
        found, true = attention(*moved, 100_000), reference.guidance_attention(*exact, 100_000)
        tolerance = {"rtol": 0.01, "atol": 0.01} if dtype == torch.float16 else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(found.double(), true, **tolerance)
        assert all(x.isfinite().all() for x in gradients(found, moved))


def test_unused_null_token_has_no_gradient() -> None:
    q, k, v, null_k, null_v = arguments()
    out = attention(q, k, v, null_k, null_v, 0)
    torch.testing.assert_close(out, reference.guidance_attention(q, k, v))
    assert torch.autograd.grad(out.sum(), [null_k, null_v], allow_unused=True) == (None, None)


def test_views_of_one_tensor() -> None:
    """Keys and the null key come from one projection, whose gradient gathers all of theirs."""

    def run(function: Any, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = x.unflatten(-1, (3, 2, 16)).unbind(1)
        k, null_k = k[:-1].unflatten(0, (2, 7)), k[-1]
        v, null_v = v[:-1].unflatten(0, (2, 7)), v[-1]
        out = function(q[:-1].unflatten(0, (2, 7)), k, v, null_k, null_v, 3)
        return out, *gradients(out, [x])

    x = torch.randn(15, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    for found, true in zip(run(attention, x), run(reference.guidance_attention, x), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("narrow", [(0, 1, 2), (0, 1), (2, 3)])
def test_mixed_dtypes(narrow: tuple[int, ...]) -> None:
    """The output has the dtype of q, each gradient that of its input."""
    inputs = [
        x.detach().half().requires_grad_() if number in narrow else x for number, x in enumerate(arguments(keys=20))
    ]
    widened = [x.detach().float().requires_grad_() for x in inputs]
    found, true = attention(*inputs, 4), reference.guidance_attention(*widened, 4)
    assert found.dtype == inputs[0].dtype
    torch.testing.assert_close(found.float(), true, rtol=0.01, atol=0.01)
    for x, mine, wanted in zip(inputs, gradients(found, inputs), gradients(true, widened), strict=True):
        assert mine.dtype == x.dtype
        torch.testing.assert_close(mine.float(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("tiles")
def test_gradient_that_is_expanded() -> None:
    inputs = arguments(queries=20, keys=17)
    found = torch.autograd.grad(attention(*inputs, 4).sum(), inputs)  # strides of 0
    wanted = torch.autograd.grad(reference.guidance_attention(*inputs, 4).sum(), inputs)
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_null_gradient_sums_every_sample(dtype: torch.dtype) -> None:
    """More samples than the last kernel reads at once, and columns that its blocks do not divide."""
    parts = [torch.randn(131, 40, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype) for seed in (0, 1)]
    sums = [torch.full((40,), torch.nan, device=DEVICE) for _ in parts]
    kernels._sum_parts[(4,)](*parts, *sums, 131, 40, BR=128, BC=32, ACC=triton.language.float32)
    for found, part in zip(sums, parts, strict=True):
        torch.testing.assert_close(found, part.double().sum(0).float())


@pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels take float64 through the interpreter only")
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("count", [0, 5])
def test_gradient_by_differences(count: int) -> None:
    inputs = arguments(dtype=torch.float64, batch=2, queries=3, keys=17, heads=1, size=8, null=count > 0)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, count=count), inputs, fast_mode=True)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    inputs = arguments(dtype=dtype, queries=20, keys=17)

    def run() -> tuple[Tensor, ...]:
        out = attention(*inputs, 4)
        return out, *gradients(out, inputs)

    assert same_bits(run)


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("strided", [False, True])
def test_operators_keep_their_promises(strided: bool, count: int) -> None:
    inputs = [x.detach() for x in arguments(batch=1, queries=3, keys=5, null=count > 0)]
    if strided:
        inputs = [uncontiguous(x) for x in inputs]
    tokens = [x.requires_grad_() for x in inputs] + [None] * (5 - len(inputs))
    torch.library.opcheck(kernels._attend, (*tokens, count))
    out, statistics = (x.detach() for x in kernels._attend(*tokens, count))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    detached = [x if x is None else x.detach() for x in tokens]
    upstream = uncontiguous(upstream) if strided else upstream
    torch.library.opcheck(kernels._attend_backward, (*detached, count, out, statistics, upstream))


def test_compiled_in_one_graph() -> None:
    inputs = arguments(keys=20)

    def run(*x: Tensor) -> Tensor:
        return 3 * attention(2 * x[0], *x[1:], 4)

    expected, found = run(*inputs), torch.compile(run, fullgraph=True)(*inputs)
    assert torch.equal(found, expected)
    for mine, true in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("size", [8, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("width", [2, 4])
def test_launch_choices(size: int, width: int) -> None:
    """Tiles are powers of two that matrix products take, hold small cases whole and fit into shared memory."""
    for queries, keys in ((1, 2), (14, 23), (76, 121), (232, 345), (5000, 5000)):
        for choose in (kernels.query_blocks, kernels.key_blocks):
            blocks = choose(queries, keys, size, width)
            for number in (blocks.queries, blocks.keys, 16 * blocks.warps):
                assert number >= 16
                assert number & (number - 1) == 0
            assert blocks.queries < 2 * max(16, queries)
            assert blocks.keys < 2 * max(16, keys)
            assert blocks.warps <= 16
            assert 2 * (blocks.queries + blocks.keys) * launch.block(size) * width <= 100 * 1024
            if keys <= 32:
                assert blocks.keys >= keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 32)}, r"must be \(B, N, heads, size\)"),
        ({"v": torch.zeros(2, 8, 2, 16)}, "k as v"),
        ({"q": torch.zeros(3, 5, 2, 16)}, "does not fit k"),
        ({"q": torch.zeros(2, 0, 2, 16)}, "at least one query and one key are needed; got 0, 7"),
        ({"k": torch.zeros(2, 0, 2, 16), "v": torch.zeros(2, 0, 2, 16)}, "at least one query and one key"),
        ({"count": -1}, "count -1 must be 0 or more"),
        ({"null_v": None}, "a null token that counts 4 needs null_k and null_v"),
        ({"null_k": torch.zeros(2, 8)}, "a null token that counts 4 needs null_k and null_v"),
        ({"q": torch.zeros(2, 5, 2, 16, dtype=torch.int32)}, "must be floating numbers"),
        ({"null_k": torch.zeros(2, 16, device="meta")}, "must be on one device; got "),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    given = dict(zip(("q", "k", "v", "null_k", "null_v"), arguments(), strict=True)) | {"count": 4}
    for name, value in change.items():
        given[name] = value.to(DEVICE) if isinstance(value, Tensor) and not value.is_meta else value
    with pytest.raises(ValueError, match=message):
        attention(**given)


def test_heads_too_large_for_the_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match='head size 260 exceeds 256; choose backend "torch"'):
        attention(*arguments(size=260), 4)
