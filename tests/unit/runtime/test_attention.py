"""Attention against the cache, each instruction set against a naive oracle in float64."""

import numpy as np
import pytest
from numpy.typing import NDArray

from .conftest import Kernels, in_bf16, to_bf16

Floats = NDArray[np.float32]


def rotary_tables(positions: int, size: int) -> tuple[Floats, Floats]:
    angles = np.outer(np.arange(positions), 10000.0 ** (-np.arange(size // 2) * 2 / size))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(
    x: NDArray[np.float64], tables: tuple[Floats, Floats], first: int
) -> NDArray[np.float64]:
    """x [length, heads, size] at positions from `first`."""
    half = x.shape[-1] // 2
    c, s = (t[first : first + len(x), None].astype(np.float64) for t in tables)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * c - b * s, a * s + b * c], axis=-1)


def oracle(
    q: NDArray[np.float64],
    keys: NDArray[np.float64],
    values: NDArray[np.float64],
    past: int,
    softcap: float,
    window: int,
) -> NDArray[np.float64]:
    """q [length, heads, size], keys and values [kv, positions, size] -> [length, heads * size]."""
    length, heads, size = q.shape
    out = np.zeros_like(q)
    for s in range(length):
        for h in range(heads):
            kv = h // (heads // len(keys))
            oldest = max(0, past + s + 1 - window) if window else 0
            seen = slice(oldest, past + s + 1)
            scores = keys[kv, seen] @ q[s, h] * size**-0.5
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[s, h] = weights / weights.sum() @ values[kv, seen]
    return out.reshape(length, heads * size)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(9, 3, 64), (4, 4, 32), (8, 1, 128), (5, 1, 48), (14, 2, 80), (2, 1, 256)],
)
@pytest.mark.parametrize(
    ("length", "past"),
    [(1, 0), (1, 1), (1, 130), (1, 511), (7, 0), (16, 250), (17, 0), (70, 0), (33, 100)],
)
@pytest.mark.parametrize("cache", [np.float32, np.float16])
def test_against_oracle(
    kernels: Kernels,
    isa: str,
    heads: int,
    kv_heads: int,
    size: int,
    length: int,
    past: int,
    cache: type,
) -> None:
    check(kernels, isa, heads, kv_heads, size, length, past, cache)


@pytest.mark.parametrize(("length", "past"), [(1, 200), (9, 250), (40, 100)])
@pytest.mark.parametrize(("softcap", "window"), [(20.0, 0), (0.0, 50), (5.0, 129)])
def test_softcap_and_window(
    kernels: Kernels, isa: str, length: int, past: int, softcap: float, window: int
) -> None:
    check(kernels, isa, 6, 2, 64, length, past, np.float32, softcap, window)


@pytest.mark.parametrize("length", [2, 5, 16])
@pytest.mark.parametrize("past", [0, 120, 128, 300])
@pytest.mark.parametrize("window", [0, 3, 130])
def test_a_few_positions_at_once_are_those_one_by_one(
    kernels: Kernels, isa: str, length: int, past: int, window: int
) -> None:
    """To the last bit: a text does not depend on how many tokens a step takes."""
    heads, kv_heads, size, capacity = 6, 2, 32, past + length
    rng = np.random.default_rng(6)
    tables = rotary_tables(capacity, size)
    qkv = rng.standard_normal((length, (heads + 2 * kv_heads) * size)).astype(np.float32)
    caches = rng.standard_normal((2, kv_heads, capacity, size)).astype(np.float16)
    together, single = caches.copy(), caches.copy()
    out = kernels.attention(isa, qkv, *together, heads, past, tables, window=window, threads=3)
    for s in range(length):
        alone = kernels.attention(
            isa, qkv[s : s + 1], *single, heads, past + s, tables, window=window
        )
        np.testing.assert_array_equal(out[s], alone[0])
    np.testing.assert_array_equal(together, single)


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFC00001])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_what_is_not_a_number_stays_so(
    kernels: Kernels, isa: str, length: int, bits: int, softcap: float
) -> None:
    """Whatever its bits: an exponential by a sum of exponents made the largest number of some."""
    size = 32
    qkv = np.ones((length, 4 * size), dtype=np.float32)
    qkv[-1, 3] = np.array([bits], dtype=np.uint32).view(np.float32)[0]
    caches = np.ones((2, 1, 40, size), dtype=np.float32)
    out = kernels.attention(isa, qkv, *caches, 2, 5, None, softcap=softcap)
    assert np.isnan(out[-1, :size]).all()
    assert np.isfinite(out[-1, size:]).all()
    assert np.isfinite(out[:-1]).all()


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("cache", [np.float32, np.float16])
def test_large_keys_lose_nothing(kernels: Kernels, isa: str, length: int, cache: type) -> None:
    """What tells positions apart may be a thousandth of a score, which bf16 alone would lose."""
    heads, size, past = 1, 64, 90
    rng = np.random.default_rng(7)
    qkv = rng.standard_normal((length, 3, size)).astype(np.float32)
    past_keys, past_values = rng.standard_normal((2, 1, past + length, size)).astype(np.float32)
    qkv[:, 0, 1:3] += 30
    for keys in (past_keys[0], qkv[:, 1]):
        keys[:, 0] += 300
        keys[:, 1] *= 10
        keys[:, 2] = -keys[:, 1]
    caches = past_keys.astype(cache), past_values.astype(cache)
    out = kernels.attention(isa, qkv.reshape(length, -1), *caches, heads, past, None)
    q = qkv[:, :heads].astype(np.float64)
    expected = oracle(q, *(c.astype(np.float64) for c in caches), past, 0, 0)
    assert np.abs(out - expected).max() < 0.01


@pytest.mark.parametrize("length", [1, 6, 40])
def test_thread_count_changes_no_bit(kernels: Kernels, isa: str, length: int) -> None:
    outputs = [
        check(kernels, isa, 9, 3, 64, length, 400, np.float16, threads=threads)
        for threads in (1, 2, 5)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


def check(
    kernels: Kernels,
    isa: str,
    heads: int,
    kv_heads: int,
    size: int,
    length: int,
    past: int,
    cache: type,
    softcap: float = 0.0,
    window: int = 0,
    threads: int = 2,
) -> Floats:
    rng = np.random.default_rng(5)
    capacity = past + length + 3
    tables = rotary_tables(capacity, size)
    keys, values = (rng.standard_normal((kv_heads, capacity, size)).astype(cache) for _ in range(2))
    qkv = rng.standard_normal((length, (heads + 2 * kv_heads) * size)).astype(np.float32)
    split = qkv.astype(np.float64).reshape(length, heads + 2 * kv_heads, size)
    q = rotate(split[:, :heads], tables, past)
    k = rotate(split[:, heads : heads + kv_heads], tables, past)
    all_keys, all_values = keys.astype(np.float64), values.astype(np.float64)
    all_keys[:, past : past + length] = k.swapaxes(0, 1)
    all_values[:, past : past + length] = split[:, heads + kv_heads :].swapaxes(0, 1)
    out = kernels.attention(
        isa, qkv, keys, values, heads, past, tables, softcap=softcap, window=window, threads=threads
    )
    tolerance = 2e-5 if cache is np.float32 else 5e-3
    np.testing.assert_allclose(keys, all_keys, atol=tolerance)
    np.testing.assert_allclose(values, all_values, atol=tolerance)
    if cache is np.float16 and in_bf16(length, isa, passes=1):  # values, and what weighs them
        all_values = to_bf16(values.astype(np.float32)).astype(np.float64)
        tolerance = 8e-3
    np.testing.assert_allclose(
        out, oracle(q, all_keys, all_values, past, softcap, window), atol=tolerance
    )
    return out
