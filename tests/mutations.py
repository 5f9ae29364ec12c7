"""Damage as it happens, or as a stranger makes it: a function from bytes to other bytes, chosen by a seed."""

import random
from collections.abc import Callable


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 8, 64))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def rubbish(data: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(data) + 1), rng.choice((4, 100, 5000))
    return data[:start] + rng.randbytes(size) + data[start + size :]


def insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice((b"\0" * 512, b"PAR1", b"[" * 3000, b"{}", b"-1", b"9" * 40)) + data[start:]


def empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def deep(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"null", b'"text"', b'{"config": 1}'))


def swap(data: bytes, rng: random.Random) -> bytes:
    """Two pieces change places, as a store that mixes two answers would have it."""
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[b:] + data[a:b] + data[:a]


KINDS: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip, rubbish, insert, empty, deep, swap)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One or two of these, one after the other."""
    for _ in range(rng.choice((1, 1, 2))):
        data = rng.choice(KINDS)(data, rng)
    return data
