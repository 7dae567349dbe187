"""The kernels in C: each against its definition in float64, and how they are compiled, kept and turned off."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmpipe.engines.kernels import (
    Segments,
    add_rms_norm,
    append,
    argmax,
    attend,
    can_attend,
    draw,
    has_kernels,
    rotate,
    silu_mul,
)
from lmpipe.engines.kernels.library import kernels

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance, equal_nan=True)


def with_tokens_in_columns(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention by its definition.

    Args:
        q: Queries, shape (key heads, queries per key head, tokens, size).
        k: Keys, shape (key heads, keys, size).
        v: Values, shape (key heads, keys, size).
        seen: Whether a token attends to a key, shape (tokens, keys).
        scale: Factor on the scores.

    Returns:
        Output and log-sum-exp, as `attend` writes them: tokens first.
    """
    scores = torch.einsum("ghtd,gkd->tghk", q.double(), k.double()) * scale
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    weights = scores.softmax(-1).masked_fill(~seen.any(-1)[:, None, None, None], 0)
    return torch.einsum("tghk,gkd->tghd", weights, v.double()), scores.logsumexp(-1)


def ranges(seed: int, tokens: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first key of each token and the last one plus one, some of them none, and which keys it sees."""
    generator = torch.Generator().manual_seed(seed)
    first, stop = (torch.randint(0, keys + 1, (tokens,), generator=generator) for _ in range(2))
    index = torch.arange(keys)
    return first, stop, (index >= first[:, None]) & (index < stop[:, None])


@given(
    *(st.integers(1, 200), st.integers(1, 150), st.integers(1, 150), st.integers(1, 3), st.integers(1, 4)),
    *(st.sampled_from([16, 64, 80, 256]), DTYPES, st.booleans(), SEEDS),
)
@settings(deadline=None, max_examples=60)
def test_attention_to_two_segments_is_that_to_both(
    tokens: int,
    keys: int,
    more_keys: int,
    groups: int,
    heads: int,
    size: int,
    dtype: torch.dtype,
    columns: bool,
    seed: int,
) -> None:
    q = normal(seed, tokens, groups, heads, size, dtype=dtype).permute(1, 2, 0, 3)
    out, lse = torch.empty(tokens, groups, heads, size, dtype=dtype), torch.empty(tokens, groups, heads)
    all_k, all_v, all_seen = [], [], []
    for number, count in enumerate([keys, more_keys]):
        k, v = (normal(seed + 2 * number + n, groups, count, size, dtype=dtype) for n in (1, 2))
        first, stop, seen = ranges(seed + number, tokens, count)
        segments = Segments.create([(0, tokens, 0)], range(tokens), first.tolist(), stop.tolist())
        attend(q, with_tokens_in_columns(k) if columns else k, v, segments, 0.1, out, lse, merge=number == 1)
        all_k, all_v, all_seen = [*all_k, k], [*all_v, v], [*all_seen, seen]
        expected = attention(q, torch.cat(all_k, 1), torch.cat(all_v, 1), torch.cat(all_seen, 1), 0.1)
        assert_close(out, expected[0])
        torch.testing.assert_close(lse.double(), expected[1], atol=2e-5, rtol=2e-5)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.sampled_from([None, 1, 20]), DTYPES, SEEDS)
@settings(deadline=None, max_examples=30)
def test_each_segment_attends_causally_to_itself(
    lengths: list[int], window: int | None, dtype: torch.dtype, seed: int
) -> None:
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    offsets = [offset for length in lengths for offset in range(length)]
    q = normal(seed, 2, 3, sum(lengths), 32, dtype=dtype)
    k, v = (normal(seed + n, 2, sum(lengths), 32, dtype=dtype) for n in (1, 2))
    segments = Segments.create(
        [(start, length, start) for start, length in zip(starts, lengths, strict=True)],
        range(sum(lengths)),
        [max(0, offset + 1 - (window or 1000)) for offset in offsets],
        [offset + 1 for offset in offsets],
    )
    out, lse = torch.empty(sum(lengths), 2, 3, 32, dtype=dtype), torch.empty(sum(lengths), 2, 3)
    attend(q, k, v, segments, 0.2, out, lse, merge=False)
    for start, length in zip(starts, lengths, strict=True):
        span = slice(start, start + length)
        seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - (window or 1000))
        assert_close(out[span], attention(q[:, :, span], k[:, span], v[:, span], seen, 0.2)[0])


@given(st.integers(1, 8), st.integers(1, 100), DTYPES, st.booleans(), SEEDS)
@settings(deadline=None, max_examples=30)
def test_new_tokens_are_appended_to_their_slot_and_attend_to_it(
    slots: int, width: int, dtype: torch.dtype, columns: bool, seed: int
) -> None:
    k, v = (normal(seed + n, slots, 2, width, 48, dtype=dtype) for n in (1, 2))
    k = with_tokens_in_columns(k) if columns else k
    positions = torch.randint(0, width, (slots,), generator=torch.Generator().manual_seed(seed))
    new = normal(seed + 3, slots, 2, 48, dtype=dtype).transpose(0, 1)
    append(new, k, positions)
    append(-new, v, positions)
    assert torch.equal(k[range(slots), :, positions], new.transpose(0, 1))
    assert torch.equal(v[range(slots), :, positions], -new.transpose(0, 1))
    q = normal(seed, slots, 2, 3, 48, dtype=dtype).permute(1, 2, 0, 3)
    segments = Segments.create(
        [(slot, 1, slot) for slot in range(slots)], range(slots), [0] * slots, (positions + 1).tolist()
    )
    out, lse = torch.empty(slots, 2, 3, 48, dtype=dtype), torch.empty(slots, 2, 3)
    attend(q, k, v, segments, 0.1, out, lse, merge=False)
    for slot, position in enumerate(positions.tolist()):
        seen = torch.arange(width)[None] <= position
        assert_close(out[slot : slot + 1], attention(q[:, :, slot : slot + 1], k[slot], v[slot], seen, 0.1)[0])


@pytest.mark.parametrize("damaged", [slice(5, 6), slice(0, 64), slice(0, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_a_key_is_not_hidden(dtype: torch.dtype, damaged: slice) -> None:
    q, k, v = (normal(n, 1, 100, 32, dtype=dtype) for n in range(3))
    k[:, damaged] = torch.nan
    segments = Segments.create([(0, 100, 0)], range(100), [0] * 100, [100] * 100)
    out, lse = torch.empty(100, 1, 1, 32, dtype=dtype), torch.empty(100, 1, 1)
    attend(q[None], k, v, segments, 0.1, out, lse, merge=False)
    assert out.isnan().all()
    assert lse.isnan().all()
    attend(q[None], torch.zeros_like(k), v, segments, 0.1, out, lse, merge=True)
    assert out.isnan().all()


def test_nothing_is_computed_for_no_tokens() -> None:
    none = Segments.create([], [], [], [])
    q, k = torch.empty(2, 3, 0, 32), normal(0, 2, 5, 32)
    attend(q, k, k, none, 0.1, torch.empty(0, 2, 3, 32), torch.empty(0, 2, 3), merge=False)
    assert argmax(torch.empty(0, 7))[1].shape == (0,)
    assert silu_mul(torch.empty(0, 16), torch.empty(0, 16)).shape == (0, 16)


def test_only_tensors_that_the_kernel_reads_correctly_are_attended_to() -> None:
    x = normal(0, 2, 5, 32)
    with torch.no_grad():
        assert can_attend(x, x, x)
        assert not can_attend(x.double(), x.double(), x.double())
        assert not can_attend(x, x, x.bfloat16())
        assert not can_attend(x, x.transpose(1, 2).contiguous().transpose(1, 2), x)
        assert not can_attend(x[..., :24], x[..., :24], x[..., :24])
        assert not can_attend(x, x, x[..., :16])
    with torch.enable_grad():
        assert not can_attend(x, x, x)


@given(st.integers(1, 200), st.integers(1, 20), st.booleans(), DTYPES, DTYPES, SEEDS)
@settings(deadline=None, max_examples=30)
def test_add_rms_norm(
    rows: int, vectors: int, has_delta: bool, delta_dtype: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    size = 16 * vectors
    residual, weight = normal(seed, rows, size), normal(seed + 1, size)
    delta = normal(seed + 2, rows, size + 7, dtype=delta_dtype)[:, :size] if has_delta else None
    total = residual.double() + (0 if delta is None else delta.double())
    out = add_rms_norm(residual, delta, weight, 1e-3, dtype)
    assert_close(residual, total)
    assert_close(out, total * (total.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight)
    assert out.dtype == dtype


@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 3), st.sampled_from([32, 64, 128]), DTYPES, SEEDS)
@settings(deadline=None, max_examples=30)
def test_rotate(rows: int, heads: int, others: int, size: int, dtype: torch.dtype, seed: int) -> None:
    x = normal(seed, rows, (heads + others) * size, dtype=dtype)
    angles = normal(seed + 1, rows, size // 2).repeat(1, 2)
    before = x.double().view(rows, -1, size)
    low, high = before[:, :heads].chunk(2, dim=-1)
    rotated = torch.cat([-high, low], -1) * angles.double().sin()[:, None]
    expected = torch.cat([before[:, :heads] * angles.double().cos()[:, None] + rotated, before[:, heads:]], 1)
    rotate(x, angles.cos(), angles.sin(), heads)
    assert_close(x, expected.view(rows, -1))


@given(st.integers(1, 200), st.integers(1, 20), DTYPES, SEEDS)
@settings(deadline=None, max_examples=30)
def test_silu_mul(rows: int, vectors: int, dtype: torch.dtype, seed: int) -> None:
    x = (normal(seed, rows, 32 * vectors) * 40).to(dtype)
    gate, up = x.chunk(2, dim=1)
    assert_close(silu_mul(gate, up), gate.double() * gate.double().sigmoid() * up.double())


def test_silu_mul_of_extreme_numbers() -> None:
    gate = torch.tensor([[-1e30, -500.0, -87.5, -20.0, 0.0, 87.5, 500.0, 1e30] * 2])
    torch.testing.assert_close(silu_mul(gate, torch.ones_like(gate)), torch.nn.functional.silu(gate))
    odd = torch.tensor([[torch.nan, torch.inf] * 8])
    assert torch.equal(silu_mul(odd, torch.ones_like(odd)).isfinite(), torch.zeros(1, 16, dtype=torch.bool))


@given(
    st.integers(1, 20),
    st.integers(1, 300),
    st.lists(st.sampled_from([0.0, -0.0, 9.0, torch.inf, -torch.inf, torch.nan]), max_size=4),
    SEEDS,
)
@settings(deadline=None)
def test_argmax_is_that_of_torch(rows: int, columns: int, special: list[float], seed: int) -> None:
    x = normal(seed, rows, columns + 5)[:, :columns]
    generator = torch.Generator().manual_seed(seed)
    for number in special:
        x[torch.rand(rows, columns, generator=generator) < 0.2] = number
    highest, index = argmax(x)
    expected = x.argmax(-1)
    assert torch.equal(highest.nan_to_num(7e9), x.gather(-1, expected[:, None])[:, 0].nan_to_num(7e9))
    assert torch.equal(x.gather(-1, index[:, None]).nan_to_num(7e9), x.gather(-1, expected[:, None]).nan_to_num(7e9))
    assert torch.equal(index[highest.isnan()], expected[highest.isnan()])


@given(st.integers(1, 20), st.integers(1, 1500), st.floats(0.01, 5), st.floats(0, 0.999), st.booleans(), SEEDS)
@settings(deadline=None)
def test_draw_inverts_the_cumulative_distribution(
    rows: int, columns: int, temperature: float, share: float, masked: bool, seed: int
) -> None:
    x = 3 * normal(seed, rows, columns + 5)[:, :columns]
    if masked:
        x[:, seed % 2 : columns - 1 : 2] = -torch.inf
    index = draw(x, argmax(x)[0], [temperature] * rows, [share] * rows)
    probabilities = (x.double() / temperature).softmax(-1)
    after = probabilities.cumsum(-1).gather(-1, index[:, None])
    before = after - probabilities.gather(-1, index[:, None])
    assert bool(((before <= share + 1e-5) & (share - 1e-5 < after)).all())
    assert bool((x.gather(-1, index[:, None]) > -torch.inf).all())  # nothing impossible is drawn


def test_draw_of_odd_numbers() -> None:
    assert draw(torch.empty(0, 7), torch.empty(0), [], []).shape == (0,)
    odd = torch.tensor([[1.0, torch.nan, 0.0], [torch.inf, 0.0, 0.0]])
    assert draw(odd, argmax(odd)[0], [1.0, 1.0], [0.5, 0.5]).tolist() == [2, 2]  # an index that exists
    one = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert [draw(one, argmax(one)[0], [1e-30], [share]).item() for share in (0.0, 0.999999)] == [1, 1]


def results(threads: int) -> list[Tensor]:
    """Returns the result of each kernel on many rows, computed by a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, v = normal(0, 2, 3, 500, 64), normal(1, 2, 300, 64), normal(2, 2, 300, 64)
        segments = Segments.create(
            [(0, 400, 0), (400, 100, 0)], range(500), [number % 50 for number in range(500)], [300] * 500
        )
        out, lse = torch.empty(500, 2, 3, 64), torch.empty(500, 2, 3)
        attend(q, k, v, segments, 0.1, out, lse, merge=False)
        x = normal(3, 500, 384)
        normed = add_rms_norm(x.clone(), x, x[0].clone(), 1e-5, torch.bfloat16)
        rotated = x.clone()
        rotate(rotated, x[:, :64].contiguous(), x[:, 64:128].contiguous(), 4)
        return [out, lse, normed, rotated, silu_mul(x, x), *argmax(x), draw(x, argmax(x)[0], [0.5] * 500, [0.5] * 500)]
    finally:
        torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    expected = results(1)
    for threads in (2, 3):
        assert all(map(torch.equal, results(threads), expected))


def test_memory_of_a_thread_is_freed_with_it() -> None:
    q, k, out, lse = (
        normal(0, 1, 1, 192, 256),
        normal(1, 1, 64, 256),
        torch.empty(192, 1, 1, 256),
        torch.empty(192, 1, 1),
    )
    segments = Segments.create([(0, 192, 0)], range(192), [0] * 192, [64] * 192)

    def run(count: int) -> int:
        for _ in range(count):
            thread = Thread(target=attend, args=(q, k, k, segments, 0.1, out, lse), kwargs={"merge": False})
            thread.start()
            thread.join()
        return int(psutil.Process().memory_info().rss)

    before = run(5)
    assert run(200) - before < 40 * 2**20  # each thread uses half a mebibyte


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A C compiler that compiles quickly and records its calls beside itself; the cache is empty."""
    path = write_compiler(tmp_path / "cc", 'exec cc "$@" -O0')
    monkeypatch.setenv("LMPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(path))
    kernels.cache_clear()
    yield path
    kernels.cache_clear()


def write_compiler(path: Path, command: str) -> Path:
    path.write_text(f'#!/bin/sh\necho "$@" >> "$0.log"\n{command}\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def compilations(compiler: Path) -> int:
    """Returns how often the kernels were compiled."""
    return sum(" -c " in line for line in Path(f"{compiler}.log").read_text(encoding="utf-8").splitlines())


def loads_again() -> bool:
    kernels.cache_clear()
    return has_kernels()


def test_processes_share_the_compiled_kernels(compiler: Path) -> None:
    code = "from lmpipe.engines.kernels import has_kernels; print(has_kernels())"
    at_once = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in at_once] == ["True\n", "True\n"]
    before = compilations(compiler)
    assert has_kernels()
    assert compilations(compiler) == before
    assert [path.suffix for path in (compiler.parent / "cache" / "kernels").iterdir()] == [".so"]


@pytest.mark.parametrize("length", [0, 5000, None])
def test_a_damaged_file_in_the_cache_is_compiled_again(compiler: Path, length: int | None) -> None:
    assert has_kernels()
    (path,) = (compiler.parent / "cache" / "kernels").iterdir()
    content = path.read_bytes()
    path.unlink()  # this process has it open
    path.write_bytes(bytes(len(content)) if length is None else content[:length])
    assert loads_again()
    assert compilations(compiler) == 2
    assert argmax(normal(0, 3, 40))[1].tolist() == normal(0, 3, 40).argmax(-1).tolist()


def test_another_compiler_or_cache_compiles_again(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_kernels()
    other = write_compiler(compiler.with_name("other"), 'exec cc "$@" -O0 -DOTHER_VERSION')
    monkeypatch.setenv("CC", f"{other} -pipe")
    assert loads_again()
    assert (compilations(compiler), compilations(other)) == (1, 1)


@pytest.mark.parametrize("command", ["exit 1", "echo oops >&2; exit 3", 'exec cc "$@" -fno-such-option', "exec true"])
def test_a_compiler_that_fails_leaves_pytorchs_functions(compiler: Path, command: str) -> None:
    write_compiler(compiler, command)
    assert not has_kernels()
    x = normal(0, 2, 5, 32)
    with torch.no_grad():
        assert not can_attend(x, x, x)


def test_without_a_compiler_or_a_cache_folder_the_engine_uses_pytorchs_functions(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LMPIPE_CACHE", str(compiler))  # a file
    assert not has_kernels()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level("INFO"):
        assert not loads_again()
    assert "no C compiler was found" in caplog.text


def test_a_compiler_without_openmp_still_compiles(compiler: Path) -> None:
    write_compiler(compiler, 'case "$*" in *-fopenmp*) exit 1;; esac; exec cc "$@" -O0')
    assert has_kernels()
    assert argmax(normal(0, 3, 40))[1].tolist() == normal(0, 3, 40).argmax(-1).tolist()


def test_an_environment_variable_turns_the_kernels_off(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMPIPE_KERNELS", "0")
    assert not has_kernels()
    assert not Path(f"{compiler}.log").exists()
