"""The one frontend of every operation that has more than one implementation.

Each function checks its arguments once and then chooses: ``"reference"`` and ``"torch"`` run plain
PyTorch from ``reference.py``, ``"triton"`` the kernels, ``"auto"`` whichever suits the tensor's device.
What is asked for by name runs or fails; nothing falls back in silence.
"""

import torch
from torch import Tensor

from sgmim_fast import attention as libraries
from sgmim_fast import reference
from sgmim_fast.errors import UserError
from sgmim_fast.masking import CELL

BACKENDS = ("auto", "reference", "torch", "triton")
LARGEST_WINDOW = 64
LARGEST_HEAD = 128
LARGEST_MAP = 2**24  # pixels


def resolve_backend(backend: str, x: Tensor) -> str:
    """The implementation that ``backend`` means for tensors like ``x``: never ``"auto"``.

    Raises:
        UserError: if the backend is unknown, or cannot run on ``x``.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if x.is_cuda and _objection(x) is None else "torch"
    if backend == "triton" and (reason := _objection(x)) is not None:
        raise UserError(f'backend "triton" cannot run here: {reason}; or choose backend "torch"')
    return backend


def _objection(x: Tensor) -> str | None:
    """Why kernels cannot run on tensors like ``x``; None if they can."""
    try:
        from sgmim_fast.kernels import launch
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return launch.objection(x)


def _replaced(attention: str, backend: str, x: Tensor) -> bool:
    """Whether a library's attention, by name, takes the place of the backend's own; refuses what cannot run."""
    if attention != "auto":
        libraries.check_attention(attention, resolve_backend(backend, x), x.device, x.dtype)
    return attention != "auto"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_index(x: Tensor, index: Tensor) -> None:
    _check(
        index.dim() == 2 and index.shape[0] == x.shape[0] and index.dtype in (torch.int32, torch.int64),
        f"index must be integers (int32 or int64) of shape (B={x.shape[0]}, K); got {tuple(index.shape)} {index.dtype}",
    )


def _check_entries(index: Tensor, count: int, once: bool = False) -> None:
    """The numbers in an index list: in [0, count), and with ``once`` no two alike.

    Read only where that waits for no device and breaks no graph: kernels write NaN for what is out of range.
    """
    if index.device.type != "cpu" or torch.compiler.is_compiling() or index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    _check(low >= 0 and high < count, f"index must be in [0, {count}); it has {low} to {high}")
    alone = not once or bool((index.sort(1).values.diff() > 0).all())
    _check(alone, "index names a place twice; each may be named once")


def _check_floating(*tensors: Tensor | None) -> None:
    for x in tensors:
        if x is not None:
            _check(x.is_floating_point(), f"the kernels take floating-point numbers, not {x.dtype}")


def _check_no_gradient(picture: Tensor) -> None:
    _check(
        not (picture.requires_grad and torch.is_grad_enabled()),
        'the kernels give no gradient to a picture; detach it, or choose backend "torch"',
    )


def _check_cells(picture: Tensor, index: Tensor, once: bool = False) -> None:
    _check(
        picture.dim() == 4 and picture.shape[2] % CELL == 0 and picture.shape[3] % CELL == 0,
        f"pictures must be (B, C, H, W) with H and W multiples of {CELL}; got {tuple(picture.shape)}",
    )
    _check_index(picture, index)
    _check_device(picture, index)
    _check_entries(index, picture.shape[2] // CELL * (picture.shape[3] // CELL), once)


def _check_device(x: Tensor, *others: Tensor | None) -> None:
    for other in others:
        if other is not None:
            _check(other.device == x.device, f"all tensors must be on {x.device}; one is on {other.device}")


def gather_rows(x: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows ``index`` (B, K) of ``x`` (B, N, C) -> (B, K, C)."""
    _check(x.dim() == 3, f"x must be (B, N, C); got {tuple(x.shape)}")
    _check_index(x, index)
    _check_device(x, index)
    _check_entries(index, x.shape[1])
    if resolve_backend(backend, x) == "triton":
        from sgmim_fast.kernels import masked_tokens

        _check_floating(x)
        return masked_tokens.gather_rows(x, index)
    return reference.gather_rows(x, index)


def scatter_rows(values: Tensor, index: Tensor, fill: Tensor, rows: int, *, backend: str = "auto") -> Tensor:
    """Rows (B, K, C) to places ``index`` (B, K), each named once, of (B, rows, C); others hold ``fill`` (C,)."""
    _check(values.dim() == 3, f"values must be (B, K, C); got {tuple(values.shape)}")
    _check_index(values, index)
    _check(index.shape[1] == values.shape[1], f"{values.shape[1]} rows of values but {index.shape[1]} indices")
    _check(fill.shape == values.shape[2:], f"fill must be (C={values.shape[2]},); got {tuple(fill.shape)}")
    _check_device(values, index, fill)
    _check_entries(index, rows, once=True)
    if resolve_backend(backend, values) == "triton":
        from sgmim_fast.kernels import masked_tokens

        _check_floating(values, fill)
        return masked_tokens.scatter_rows(values, index, fill, rows)
    return reference.scatter_rows(values, index, fill, rows)


def gather_cells(x: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Mask cells ``index`` (B, K) of pictures (B, C, H, W) -> (B, K, C, 32, 32)."""
    _check_cells(x, index)
    if resolve_backend(backend, x) == "triton":
        from sgmim_fast.kernels import cell_patches

        _check_floating(x)
        _check_no_gradient(x)
        return cell_patches.gather_cells(x, index)
    return reference.gather_cells(x, index)


def embed_visible(
    image: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    mask_token: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Patch embedding of the visible cells, the mask token elsewhere: (B, H / p, W / p, E), as in ``reference``."""
    _check_cells(image, visible, once=True)
    width, patch = weight.shape[0], weight.shape[-1]
    _check(
        weight.shape[1:] == (image.shape[1], patch, patch) and CELL % patch == 0,
        f"weight must be (E, C={image.shape[1]}, p, p) with p dividing {CELL}; got {tuple(weight.shape)}",
    )
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias, "mask_token": mask_token}
    for name, vector in vectors.items():
        if vector is not None:
            _check(vector.shape == (width,), f"{name} must be (E={width},); got {tuple(vector.shape)}")
    _check((norm_weight is None) == (norm_bias is None), "norm_weight and norm_bias are given together or not at all")
    _check_device(image, weight, *vectors.values())
    if resolve_backend(backend, weight) == "triton":
        from sgmim_fast.kernels import embed_visible as kernels

        _check_floating(image, weight, *vectors.values())
        _check_no_gradient(image)
        dtype, kind = weight.dtype, image.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            # As the convolution would be cast; on CUDA a norm after it gives float32.
            dtype = torch.get_autocast_dtype(kind)
            weight, bias = weight.to(dtype), bias.to(dtype)
            dtype = torch.float32 if kind == "cuda" and norm_weight is not None else dtype
        return kernels.embed_visible(
            image, visible, weight, bias, norm_weight, norm_bias, norm_eps, mask_token, dtype
        )  # fmt: skip
    return reference.embed_visible(image, visible, weight, bias, norm_weight, norm_bias, norm_eps, mask_token)


def _check_attention(side: int, qkv: Tensor, *others: Tensor | None) -> None:
    """What the kernels ask of an attention over windows of ``side`` tokens a side."""
    other = 'choose backend "torch" or attention "sdpa"'
    _check(
        side <= LARGEST_WINDOW,
        f"the kernels take windows of at most {LARGEST_WINDOW} tokens a side, not {side}; {other}",
    )
    size = qkv.shape[-1]
    _check(size <= LARGEST_HEAD, f"the kernels take heads of at most {LARGEST_HEAD} channels, not {size}; {other}")
    for tensor in (qkv, *others):
        _check(
            tensor is None or (tensor.is_floating_point() and tensor.device == qkv.device),
            f"all tensors must be floating-point and on {qkv.device}; one is {tensor.dtype} on {tensor.device}"
            if tensor is not None
            else "",
        )


def window_attention(
    qkv: Tensor,
    table: Tensor,
    window: int,
    shift: int,
    logit_scale: Tensor | None = None,
    *,
    backend: str = "auto",
    attention: str = "auto",
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
    _check(
        logit_scale is None or logit_scale.shape == (heads,),
        f"logit_scale must be (T={heads},); got {None if logit_scale is None else tuple(logit_scale.shape)}",
    )
    if _replaced(attention, backend, qkv):
        return libraries.window_attention(attention, qkv, table, window, shift, logit_scale)
    if resolve_backend(backend, qkv) == "triton":
        from sgmim_fast.kernels import window_attention as kernels

        _check_attention(window, qkv, table, logit_scale)
        return kernels.window_attention(qkv, table, window, shift, logit_scale)
    return reference.window_attention(qkv, table, window, shift, logit_scale)


def class_token_attention(
    qkv: Tensor, table: Tensor, grid: tuple[int, int], *, backend: str = "auto", attention: str = "auto"
) -> Tensor:
    """Global attention with a class token: qkv (B, 1 + H * W, 3, T, D) -> (B, 1 + H * W, T * D)."""
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    _check(
        qkv.dim() == 5 and qkv.shape[1] == 1 + grid[0] * grid[1],
        f"qkv must be (B, 1 + {grid[0]} * {grid[1]}, 3, heads, size); got {tuple(qkv.shape)}",
    )
    _check(table.shape == (rows, qkv.shape[3]), f"table must be ({rows}, {qkv.shape[3]}); got {tuple(table.shape)}")
    if _replaced(attention, backend, qkv):
        return libraries.class_token_attention(attention, qkv, table, grid)
    if resolve_backend(backend, qkv) == "triton":
        from sgmim_fast.kernels import window_attention as kernels

        _check_attention(max(grid), qkv, table)
        return kernels.class_token_attention(qkv, table, grid)
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
    attention: str = "auto",
) -> Tensor:
    """Cross-attention (B, Nq, T, D) x (B, Nk, T, D) with one counted null token, as in ``reference``."""
    _check(q.dim() == 4 and k.dim() == 4 and k.shape == v.shape, "q, k and v must be (B, N, heads, size), k as v")
    _check(
        q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:], f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}"
    )
    _check(
        min(q.shape[1], k.shape[1]) > 0, f"at least one query and one key are needed; got {q.shape[1]}, {k.shape[1]}"
    )
    _check(count >= 0, f"count {count} must be 0 or more")
    _check(
        count == 0 or (null_k is not None and null_v is not None and null_k.shape == null_v.shape == q.shape[2:]),
        f"a null token that counts {count} needs null_k and null_v of shape {tuple(q.shape[2:])}",
    )
    given = [x for x in (q, k, v, null_k, null_v) if x is not None]
    _check(all(x.is_floating_point() for x in given), "q, k, v and the null token must be floating numbers")
    devices = sorted({str(x.device) for x in given})
    _check(len(devices) == 1, f"q, k, v and the null token must be on one device; got {' and '.join(devices)}")
    if _replaced(attention, backend, q):
        return libraries.guidance_attention(attention, q, k, v, null_k, null_v, count)
    if resolve_backend(backend, q) == "triton":
        from sgmim_fast.kernels import guidance_attention as kernel

        largest = kernel.LARGEST_HEAD
        _check(q.shape[3] <= largest, f'head size {q.shape[3]} exceeds {largest}; choose backend "torch" for it')
        return kernel.guidance_attention(q, k, v, null_k, null_v, count)
    return reference.guidance_attention(q, k, v, null_k, null_v, count)


def masked_l1(prediction: Tensor, picture: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean absolute error over selected cells, in token space; see ``reference.masked_l1``."""
    side = prediction.shape[2] if prediction.dim() == 5 else 0
    _check(
        side > 0 and prediction.shape[3] == side and CELL % side == 0,
        f"prediction must be (B, K, t, t, C * s * s) with t dividing {CELL}; got {tuple(prediction.shape)}",
    )
    _check_cells(picture, index)
    _check(
        prediction.shape[:2] == index.shape,
        f"prediction is of {tuple(prediction.shape[:2])} cells, but index names {tuple(index.shape)}",
    )
    size = CELL // side
    _check(
        prediction.shape[4] == picture.shape[1] * size**2,
        f"prediction has {prediction.shape[4]} channels; {picture.shape[1]} x {size} x {size} are needed",
    )
    _check_device(prediction, picture)
    if resolve_backend(backend, prediction) == "triton":
        from sgmim_fast.kernels import masked_l1 as kernel

        _check_floating(prediction, picture)
        _check_no_gradient(picture)
        return kernel.masked_l1(prediction, picture, index)
    return reference.masked_l1(prediction, picture, index)


def standardize_structure(maps: Tensor, *, backend: str = "auto") -> Tensor:
    """Structure maps (B, C, H, W) standardised by their trimmed mean and variance, each channel on its own.

    A channel that holds a NaN or an infinity becomes NaN as a whole.
    """
    _check(maps.dim() == 4 and maps.is_floating_point(), f"maps must be float (B, C, H, W); got {tuple(maps.shape)}")
    pixels = maps.shape[2] * maps.shape[3]
    _check(2 < pixels <= LARGEST_MAP, f"maps must have 3 to {LARGEST_MAP} pixels; got {tuple(maps.shape)}")
    rows = maps.flatten(2).flatten(0, 1)
    backend = resolve_backend(backend, maps)
    if backend == "triton":
        from sgmim_fast.kernels import trimmed_stats as kernels

        _check_no_gradient(maps)
        return kernels.standardize(rows, *kernels.trimmed_stats(rows)).view(maps.shape)
    plain = backend == "reference"
    mean, variance = (reference.trimmed_stats if plain else reference.trimmed_stats_by_selection)(rows)
    return reference.standardize(maps, mean, variance)
