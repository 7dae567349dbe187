"""The kernels as functions of tensors.

They need tensors on the CPU, in float32 or bfloat16. Nothing is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from lmpipe.engines.kernels.library import kernels

_MAX_SIZE = 256  # of a head; see kernels.c
_LANES = 16  # sizes must be a multiple of it: no processor has longer vectors of float32


def has_kernels() -> bool:
    """Whether the kernels could be compiled here."""
    return kernels() is not None


def can_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernel computes attention of queries (..., size) to keys (..., size) and values (..., value size)."""
    size = q.shape[-1]
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and size == v.shape[-1]
        and size % _LANES == 0
        and size <= _MAX_SIZE
        and not torch.is_grad_enabled()
        and has_kernels()
    )


@final
@dataclass(frozen=True, slots=True)
class Segments:
    """Segments of context, each with the tokens that attend to it.

    Attributes:
        table: First entry, number of entries, and place of the keys and values, of each segment; shape (segments, 3).
        rows: Token of each entry; shape (entries,).
        first: First key that the entry's token attends to; shape (entries,).
        stop: Last key that it attends to, plus one; shape (entries,).
    """

    table: torch.Tensor
    rows: torch.Tensor
    first: torch.Tensor
    stop: torch.Tensor

    @property
    def arguments(self) -> tuple[int, ...]:
        """The segments as arguments of the kernels."""
        rest = (self.rows.data_ptr(), self.first.data_ptr(), self.stop.data_ptr())
        return (self.table.data_ptr(), len(self.table), *rest)

    @classmethod
    def create(
        cls,
        table: Sequence[tuple[int, int, int]],
        rows: Sequence[int],
        first: Sequence[int],
        stop: Sequence[int],
    ) -> Segments:
        """Makes the tensors from lists."""
        return cls(
            torch.tensor(table, dtype=torch.int64).view(-1, 3),
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(first, dtype=torch.int32),
            torch.tensor(stop, dtype=torch.int32),
        )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Computes the attention of tokens to segments of context; Hydragen's passes (arXiv 2402.05099), fused.

    Args:
        q: Queries, shape (key heads, queries per key head, tokens, size); all heads are evenly spaced.
        k: Keys, shape (key heads, tokens, size), and the place of a segment is its first token; or shape (slots, key
            heads, tokens, size), and the place is the slot. The numbers of a key are contiguous, or its tokens are.
        v: Values, of the same shape; the numbers of each are contiguous.
        segments: The segments; a token occurs in one of them at most.
        scale: Factor on the scores.
        out: Receives the attention output, shape (tokens, key heads, queries per key head, size).
        lse: Receives the log-sum-exp of the scores, shape (tokens, key heads, queries per key head).
        merge: Whether `out` and `lse` hold the attention to other segments, which is then merged with this one.

    Raises:
        MemoryError: If there is no memory for intermediate results.
    """
    groups, heads, _, size = q.shape
    strides = _strides(q, k, v, out, lse)
    failed = kernels().attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        strides.data_ptr(),
        *segments.arguments,
        groups,
        heads,
        size,
        scale,
        q.dtype == torch.bfloat16,
        merge,
    )
    if failed:
        raise MemoryError("no memory for the scores of attention")


def _strides(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Returns the distances between numbers that the kernels of attention need."""
    place = 0 if k.dim() == 4 else k.dim() - 2
    return torch.tensor(
        [
            q.stride(2),
            q.stride(1) if q.shape[1] > 1 else q.stride(0),  # the stride of a dimension of size 1 means nothing
            *(k.stride(dim) for dim in (place, -3, -2, -1)),
            *(v.stride(dim) for dim in (place, -3, -2)),
            *(out.stride(dim) for dim in (0, 2)),
            *(lse.stride(dim) for dim in (0, 2)),
        ]
    )


def attend_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    scale: float,
    out_gradient: torch.Tensor,
    lse: torch.Tensor,
    deltas: torch.Tensor,
    gradients: torch.Tensor,
) -> None:
    """Adds the gradients of attention to some segments (Dao 2023, arXiv 2307.08691, section 3.1).

    Args:
        q: Queries, as for `attend`.
        k: Keys, shape (key heads, tokens, size); the numbers of a key are adjacent.
        v: Values, likewise.
        segments: The segments; no two of them share keys.
        scale: Factor on the scores.
        out_gradient: Gradient of the output, shape (tokens, key heads, queries per key head, size).
        lse: Log-sum-exp of the scores of all segments, shape (tokens, key heads, queries per key head).
        deltas: Sum of output times gradient of each token and head, of the same shape.
        gradients: Receives the gradients in float32: those of the queries, keys and values of a token side by side,
            shape (tokens, numbers).

    Raises:
        MemoryError: If there is no memory for intermediate results.
    """
    groups, heads, _, size = q.shape
    strides = _strides(q, k, v, out_gradient, lse)
    failed = kernels().attention_backward(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out_gradient.data_ptr(),
        lse.data_ptr(),
        deltas.data_ptr(),
        gradients.data_ptr(),
        gradients.stride(0),
        strides.data_ptr(),
        *segments.arguments,
        groups,
        heads,
        size,
        scale,
        q.dtype == torch.bfloat16,
    )
    if failed:
        raise MemoryError("no memory for the gradients of attention")


def append(x: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor) -> None:
    """Writes the keys or values of new tokens to a cache.

    Args:
        x: Keys or values, shape (key heads, slots, size).
        cache: Cache that receives them, shape (slots or more, key heads, width, size).
        positions: Position of each new token in its slot, shape (slots,).
    """
    groups, slots, size = x.shape
    kernels().append(
        x.data_ptr(),
        x.stride(1),
        x.stride(0),
        cache.data_ptr(),
        *cache.stride(),
        positions.data_ptr(),
        slots,
        groups,
        size,
        x.element_size(),
    )


def argmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest number of each row, and its index; NaN counts as the largest, as in PyTorch.

    Args:
        x: Numbers in float32, shape (rows, columns); those of a row are contiguous.
    """
    highest, index = torch.empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    kernels().argmax(x.data_ptr(), x.stride(0), highest.data_ptr(), index.data_ptr(), *x.shape)
    return highest, index


def draw(
    x: torch.Tensor, highest: torch.Tensor, temperatures: Sequence[float], shares: Sequence[float]
) -> torch.Tensor:
    """Returns for each row the first index at which the cumulative probability exceeds a share of the total.

    Args:
        x: Logits in float32, shape (rows, columns); those of a row are contiguous.
        highest: The largest logit of each row in float32, contiguous, shape (rows,).
        temperatures: Temperature of each row, above 0.
        shares: Share of each row, in [0, 1).

    Returns:
        Indices, shape (rows,), of columns whose probability is above 0.
    """
    index = torch.empty(len(x), dtype=torch.int64)
    divisors, points = torch.tensor(temperatures, dtype=torch.float32), torch.tensor(shares, dtype=torch.float64)
    kernels().draw(
        x.data_ptr(),
        x.stride(0),
        highest.data_ptr(),
        divisors.data_ptr(),
        points.data_ptr(),
        index.data_ptr(),
        *x.shape,
    )
    return index


def add_rms_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Adds to the residual stream in place, and returns it normalized (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        residual: Residual stream in float32, contiguous, shape (tokens, size).
        delta: Numbers to add, shape (tokens, size), or None.
        weight: Weight of the normalization in float32, shape (size,).
        eps: Number that is added to the mean square.
        dtype: Dtype of the result.

    Returns:
        The normalized stream, shape (tokens, size).
    """
    rows, size = residual.shape
    out = torch.empty(rows, size, dtype=dtype)
    kernels().add_rms_norm(
        residual.data_ptr(),
        None if delta is None else delta.data_ptr(),
        0 if delta is None else delta.stride(0),
        delta is not None and delta.dtype == torch.bfloat16,
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        dtype == torch.bfloat16,
        rows,
        size,
    )
    return out


def rms_norm_backward(
    residual: torch.Tensor, weight: torch.Tensor, eps: float, out_gradient: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Adds the gradient of the input of `add_rms_norm` to the gradient of the residual stream, in place.

    Args:
        residual: Residual stream that was normalized, in float32, shape (tokens, size).
        weight: Weight of the normalization in float32, shape (size,).
        eps: Number that is added to the mean square.
        out_gradient: Gradient of the normalized stream, contiguous, shape (tokens, size).
        gradient: Gradient of the residual stream from later layers in float32, shape (tokens, size); receives the sum.

    Returns:
        A copy of the sum in the dtype of `out_gradient`.
    """
    delta = torch.empty_like(out_gradient)
    kernels().rms_norm_backward(
        residual.data_ptr(),
        weight.data_ptr(),
        eps,
        out_gradient.data_ptr(),
        out_gradient.dtype == torch.bfloat16,
        gradient.data_ptr(),
        delta.data_ptr(),
        *residual.shape,
    )
    return delta


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, heads: int) -> None:
    """Applies rotary position embeddings in place to the first heads of each token (Su et al. 2021, arXiv 2104.09864).

    Args:
        x: Projections of tokens, shape (tokens, numbers); a token's numbers are contiguous.
        cosines: Cosines in float32, contiguous, shape (tokens, size of a head).
        sines: Sines, likewise.
        heads: Number of heads to rotate, from the first number of a token on.
    """
    kernels().rotate(
        x.data_ptr(),
        x.stride(0),
        x.dtype == torch.bfloat16,
        cosines.data_ptr(),
        sines.data_ptr(),
        len(x),
        heads,
        cosines.shape[1],
    )


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns ``silu(gate) * up`` (SwiGLU; Shazeer 2020, arXiv 2002.05202); both of shape (tokens, size)."""
    out = torch.empty(gate.shape, dtype=gate.dtype)
    kernels().silu_mul(
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        out.data_ptr(),
        gate.dtype == torch.bfloat16,
        *gate.shape,
    )
    return out


def silu_mul_backward(gate_up: torch.Tensor, out_gradient: torch.Tensor) -> torch.Tensor:
    """Returns the gradients of ``silu(gate) * up``.

    Args:
        gate_up: Gate and up side by side, contiguous, shape (tokens, twice the size).
        out_gradient: Gradient of the result, contiguous, shape (tokens, size).

    Returns:
        The gradients of gate and up side by side, shape (tokens, twice the size).
    """
    gradients = torch.empty_like(gate_up)
    kernels().silu_mul_backward(
        gate_up.data_ptr(),
        out_gradient.data_ptr(),
        gradients.data_ptr(),
        gate_up.dtype == torch.bfloat16,
        *out_gradient.shape,
    )
    return gradients
