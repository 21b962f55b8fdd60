"""The one frontend of every operation that has more than one implementation.

Each function checks its arguments once and then chooses: ``"reference"`` and ``"torch"`` run plain
PyTorch from ``reference.py``, ``"triton"`` the kernels, ``"auto"`` whichever suits the tensor's device.
What is asked for by name runs or fails; nothing falls back in silence.
"""

from torch import Tensor

from sgmim_fast import reference
from sgmim_fast.errors import UserError
from sgmim_fast.masking import CELL

BACKENDS = ("auto", "reference", "torch", "triton")


def resolve_backend(backend: str, x: Tensor) -> str:
    """The implementation that ``backend`` means for tensors like ``x``: never ``"auto"``.

    Raises:
        UserError: if the backend is unknown, or cannot run here.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "triton":
        raise UserError('backend "triton" is not available: this version has no Triton kernels yet; use "torch"')
    # "auto" will mean "triton" for CUDA tensors once kernels exist; x is what that choice depends on.
    return "torch" if backend == "auto" else backend


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_index(x: Tensor, index: Tensor) -> None:
    _check(
        index.dim() == 2 and index.shape[0] == x.shape[0] and not index.is_floating_point(),
        f"index must be integers of shape (B={x.shape[0]}, K); got {tuple(index.shape)} {index.dtype}",
    )


def gather_rows(x: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows ``index`` (B, K) of ``x`` (B, N, C) -> (B, K, C)."""
    _check(x.dim() == 3, f"x must be (B, N, C); got {tuple(x.shape)}")
    _check_index(x, index)
    resolve_backend(backend, x)
    return reference.gather_rows(x, index)


def scatter_rows(values: Tensor, index: Tensor, fill: Tensor, rows: int, *, backend: str = "auto") -> Tensor:
    """Rows (B, K, C) to places ``index`` (B, K) of (B, rows, C); other rows hold ``fill`` (C,)."""
    _check(values.dim() == 3, f"values must be (B, K, C); got {tuple(values.shape)}")
    _check_index(values, index)
    _check(index.shape[1] == values.shape[1], f"{values.shape[1]} rows of values but {index.shape[1]} indices")
    _check(fill.shape == values.shape[2:], f"fill must be (C={values.shape[2]},); got {tuple(fill.shape)}")
    resolve_backend(backend, values)
    return reference.scatter_rows(values, index, fill, rows)


def gather_cells(x: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Mask cells ``index`` (B, K) of pictures (B, C, H, W) -> (B, K, C, 32, 32)."""
    _check(
        x.dim() == 4 and x.shape[2] % CELL == 0 and x.shape[3] % CELL == 0,
        f"pictures must be (B, C, H, W) with H and W multiples of {CELL}; got {tuple(x.shape)}",
    )
    _check_index(x, index)
    resolve_backend(backend, x)
    return reference.gather_cells(x, index)


def window_attention(
    qkv: Tensor, table: Tensor, window: int, shift: int, logit_scale: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Attention in (shifted) windows: qkv (B, H, W, 3, T, D) -> (B, H, W, T * D), as in ``reference``."""
    _check(qkv.dim() == 6 and qkv.shape[3] == 3, f"qkv must be (B, H, W, 3, heads, size); got {tuple(qkv.shape)}")
    height, width, heads = qkv.shape[1], qkv.shape[2], qkv.shape[4]
    _check(
        height % window == 0 and width % window == 0,
        f"window {window} must divide the map {height}x{width}; pad it first",
    )
    _check(0 <= shift < window, f"shift {shift} must be in [0, window={window})")
    _check(
        table.shape == ((2 * window - 1) ** 2, heads),
        f"table must be ({(2 * window - 1) ** 2}, {heads}); got {tuple(table.shape)}",
    )
    resolve_backend(backend, qkv)
    return reference.window_attention(qkv, table, window, shift, logit_scale)


def class_token_attention(qkv: Tensor, table: Tensor, grid: tuple[int, int], *, backend: str = "auto") -> Tensor:
    """Global attention with a class token: qkv (B, 1 + H * W, 3, T, D) -> (B, 1 + H * W, T * D)."""
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    _check(
        qkv.dim() == 5 and qkv.shape[1] == 1 + grid[0] * grid[1],
        f"qkv must be (B, 1 + {grid[0]} * {grid[1]}, 3, heads, size); got {tuple(qkv.shape)}",
    )
    _check(table.shape == (rows, qkv.shape[3]), f"table must be ({rows}, {qkv.shape[3]}); got {tuple(table.shape)}")
    resolve_backend(backend, qkv)
    return reference.class_token_attention(qkv, table, grid)


def guidance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_k: Tensor | None = None,
    null_v: Tensor | None = None,
    count: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Cross-attention (B, Nq, T, D) x (B, Nk, T, D) with one counted null token, as in ``reference``."""
    _check(q.dim() == 4 and k.dim() == 4 and k.shape == v.shape, "q, k and v must be (B, N, heads, size), k as v")
    _check(
        q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:], f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}"
    )
    _check(count >= 0, f"count {count} must be 0 or more")
    _check(
        count == 0 or (null_k is not None and null_v is not None and null_k.shape == null_v.shape == q.shape[2:]),
        f"a null token that counts {count} needs null_k and null_v of shape {tuple(q.shape[2:])}",
    )
    resolve_backend(backend, q)
    return reference.guidance_attention(q, k, v, null_k, null_v, count)


def masked_l1(prediction: Tensor, picture: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean absolute error over selected cells, in token space; see ``reference.masked_l1``."""
    _check(
        prediction.dim() == 5 and prediction.shape[2] == prediction.shape[3] and CELL % prediction.shape[2] == 0,
        f"prediction must be (B, K, t, t, C * s * s) with t dividing {CELL}; got {tuple(prediction.shape)}",
    )
    size = CELL // prediction.shape[2]
    _check(
        prediction.shape[4] == picture.shape[1] * size**2,
        f"prediction has {prediction.shape[4]} channels; {picture.shape[1]} x {size} x {size} are needed",
    )
    _check_index(prediction, index)
    resolve_backend(backend, prediction)
    return reference.masked_l1(prediction, picture, index)


def standardize_structure(maps: Tensor, *, backend: str = "auto") -> Tensor:
    """Structure maps (B, C, H, W) standardised by their trimmed mean and variance, each channel on its own."""
    _check(maps.dim() == 4 and maps.is_floating_point(), f"maps must be float (B, C, H, W); got {tuple(maps.shape)}")
    rows = maps.flatten(2).flatten(0, 1)
    plain = resolve_backend(backend, maps) == "reference"
    mean, variance = (reference.trimmed_stats if plain else reference.trimmed_stats_by_selection)(rows)
    return reference.standardize(maps, mean, variance)
