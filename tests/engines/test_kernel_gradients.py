"""The gradients that the kernels compute: each against autograd in float64."""

from __future__ import annotations

from threading import Thread

import psutil
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from lmpipe.engines.kernels import attend, attend_backward, rms_norm_backward, silu_mul_backward
from lmpipe.engines.training.packed_batch import PackedBatch
from tests.engines.test_kernels import DTYPES, SEEDS, assert_close, attention, normal

Families = list[tuple[int, list[int]]]
FAMILIES = st.lists(
    st.tuples(st.integers(0, 30), st.lists(st.integers(1, 60), min_size=1, max_size=3)), min_size=1, max_size=3
)


def seen_tokens(shared: int, families: Families) -> Tensor:
    """Returns whether a token of a packed batch attends to another one, shape (tokens, tokens)."""
    tokens = shared + sum(stem + sum(lengths) for stem, lengths in families)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    seen[:, :shared] = True
    start = shared
    for stem, lengths in families:
        end = start + stem + sum(lengths)
        seen[start:end, start : start + stem] = True
        start += stem
        for length in lengths:
            seen[start : start + length, start : start + length] = True
            start += length
    return seen.tril()


def attention_gradients(
    qkv: Tensor, groups: int, size: int, batch: PackedBatch, slope: Tensor, *, side_by_side: bool
) -> Tensor:
    """Returns what `attend` and `attend_backward` compute for queries, keys and values that are side by side."""
    tokens = len(qkv)
    heads = qkv.shape[1] // size // groups - 2
    q, k, v = (
        part.view(tokens, -1, size).transpose(0, 1)
        for part in qkv.split([groups * heads * size, groups * size, groups * size], 1)
    )
    if not side_by_side:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    q = q.view(groups, heads, tokens, size)
    out, lse = torch.empty(tokens, groups, heads, size, dtype=qkv.dtype), torch.empty(tokens, groups, heads)
    for number, segments in enumerate(batch.segments):
        attend(q, k, v, segments, 0.2, out, lse, merge=number > 0)
    deltas, gradients = (out.float() * slope.float()).sum(-1), torch.zeros(qkv.shape)
    for segments in batch.segments:
        attend_backward(q, k, v, segments, 0.2, slope, lse, deltas, gradients)
    return gradients


@given(
    *(st.integers(0, 80), FAMILIES, st.integers(1, 3), st.integers(1, 4), st.sampled_from([16, 32, 80, 256])),
    *(st.booleans(), DTYPES, SEEDS),
)
@settings(deadline=None, max_examples=40)
def test_attention(
    shared: int,
    families: Families,
    groups: int,
    heads: int,
    size: int,
    side_by_side: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    seen = seen_tokens(shared, families)
    tokens = len(seen)
    qkv = (normal(seed, tokens, groups * (heads + 2) * size) / size**0.25).to(dtype)
    slope = normal(seed + 1, tokens, groups, heads, size).to(dtype)
    gradients = attention_gradients(qkv, groups, size, PackedBatch(shared, families), slope, side_by_side=side_by_side)
    exact = qkv.double().requires_grad_()
    q, k, v = exact.split([groups * heads * size, groups * size, groups * size], 1)
    out, _ = attention(
        q.view(tokens, groups, heads, size).permute(1, 2, 0, 3),
        k.view(tokens, groups, size).transpose(0, 1),
        v.view(tokens, groups, size).transpose(0, 1),
        seen,
        0.2,
    )
    (expected,) = torch.autograd.grad(out, exact, slope.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((gradients - expected).norm()) <= tolerance * float(expected.norm())


@given(st.integers(1, 150), st.integers(1, 20), DTYPES, SEEDS)
@settings(deadline=None, max_examples=30)
def test_rms_norm(rows: int, vectors: int, dtype: torch.dtype, seed: int) -> None:
    size = 16 * vectors
    residual, weight, gradient = normal(seed, rows, size), normal(seed + 1, size), normal(seed + 2, rows, size)
    slope = normal(seed + 3, rows, size, dtype=dtype)
    exact = residual.double().requires_grad_()
    out = exact * (exact.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight
    expected = gradient + torch.autograd.grad(out, exact, slope.double())[0]
    delta = rms_norm_backward(residual, weight, 1e-3, slope, gradient)
    assert_close(gradient, expected)
    assert delta.dtype == dtype
    assert_close(delta, expected)


@given(st.integers(1, 150), st.integers(1, 20), DTYPES, SEEDS)
@settings(deadline=None, max_examples=30)
def test_silu_mul(rows: int, vectors: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = (normal(seed, rows, 32 * vectors) * 20).to(dtype)
    slope = normal(seed + 1, rows, 16 * vectors, dtype=dtype)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    (expected,) = torch.autograd.grad(silu(gate) * up, exact, slope.double())
    assert_close(silu_mul_backward(gate_up, slope), expected)


def test_silu_mul_of_extreme_numbers() -> None:
    gate_up = torch.tensor([[-1e30, -500.0, -87.5, -20.0, 0.0, 87.5, 500.0, 1e30] * 2 + [1.0] * 16])
    exact = gate_up.clone().requires_grad_()
    (expected,) = torch.autograd.grad(silu(exact[:, :16]) * exact[:, 16:], exact, torch.ones(1, 16))
    torch.testing.assert_close(silu_mul_backward(gate_up, torch.ones(1, 16)), expected)
    gate_up[0, :16] = torch.nan
    assert silu_mul_backward(gate_up, torch.ones(1, 16)).isnan().all()


def test_nan_is_not_hidden() -> None:
    qkv = normal(0, 90, 4 * 32)
    qkv[40, 64:96] = torch.nan  # a key that all tokens of the family attend to
    slope = normal(1, 90, 1, 2, 32)
    gradients = attention_gradients(qkv, 1, 32, PackedBatch(50, [(0, [40])]), slope, side_by_side=True)
    assert gradients[50:, :64].isnan().all()
    assert rms_norm_backward(qkv, torch.ones(128), 1e-5, torch.ones(90, 128), torch.zeros(90, 128))[40].isnan().all()


def results(threads: int) -> list[Tensor]:
    """Returns the gradients of each kernel on many rows, computed by a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = PackedBatch(100, [(0, [90]), (40, [60, 80]), (0, [130])])
        attention = attention_gradients(
            normal(0, 500, 8 * 64), 2, 64, batch, normal(1, 500, 2, 2, 64), side_by_side=True
        )
        x, gradient = normal(2, 500, 384), normal(3, 500, 384)
        delta = rms_norm_backward(x, x[0].clone(), 1e-5, x.flip(0), gradient)
        return [attention, delta, gradient, silu_mul_backward(x, x[:, :192].contiguous())]
    finally:
        torch.set_num_threads(before)


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    expected = results(1)
    for threads in (2, 3):
        assert all(map(torch.equal, results(threads), expected))


def test_memory_of_a_thread_is_freed_with_it() -> None:
    qkv, slope, batch = normal(0, 64, 3 * 256), normal(1, 64, 1, 1, 256), PackedBatch(0, [(0, [64])])

    def run(count: int) -> int:
        for _ in range(count):
            thread = Thread(target=attention_gradients, args=(qkv, 1, 256, batch, slope), kwargs={"side_by_side": True})
            thread.start()
            thread.join()
        return int(psutil.Process().memory_info().rss)

    before = run(5)
    assert run(200) - before < 40 * 2**20  # each thread uses half a mebibyte
