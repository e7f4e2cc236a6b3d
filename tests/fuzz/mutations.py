"""Mutations of bytes: blind ones, and ones that keep a tar's checksums or a JSON's syntax, so that damage gets further in."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

Mutation = Callable[[random.Random, bytearray], bytearray]

_NUMBERS = [
    "-1",
    "0",
    "1",
    "1e30",
    "-5",
    "NaN",
    "1.5",
    "true",
    "null",
    '"1"',
    "[]",
    "{}",
    "99999999999999999999",
    "9" * 5000,
]
_STRINGS = ['"\\ud800"', '"\\u0000"', '""', '" "', '"' + "a" * 3000 + '"', '"\\ud83d\\ude00"', '"\u202e"']
_INTEGERS = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    (1 << 63) - 1,
    (1 << 64) - 1,
]


def flip(rng: random.Random, data: bytearray) -> bytearray:
    """One bit."""
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def overwrite(rng: random.Random, data: bytearray) -> bytearray:
    """A few bytes by random ones, by zeros, or by 0xff."""
    if data:
        start, count = rng.randrange(len(data)), rng.choice([1, 2, 4, 8, 64, 512])
        filling = rng.choice([rng.randbytes(count), bytes(count), b"\xff" * count])
        data[start : start + count] = filling[: len(data) - start]
    return data


def integer(rng: random.Random, data: bytearray) -> bytearray:
    """An integer that is an edge of some type."""
    width = rng.choice([1, 2, 4, 8])
    if len(data) >= width:
        start = rng.randrange(len(data) - width + 1)
        value = rng.choice(_INTEGERS) & ((1 << 8 * width) - 1)
        data[start : start + width] = value.to_bytes(width, rng.choice(["little", "big"]))
    return data


def cut(rng: random.Random, data: bytearray) -> bytearray:
    """The end, or a piece."""
    if data:
        start = rng.randrange(len(data))
        del data[start : rng.choice([len(data), start + rng.choice([1, 7, 512])])]
    return data


def repeat(rng: random.Random, data: bytearray) -> bytearray:
    """A piece, a second time."""
    if data:
        start = rng.randrange(len(data))
        piece = data[start : start + rng.choice([1, 16, 512, 1536])]
        at = rng.randrange(len(data) + 1)
        data[at:at] = piece
    return data


def move_block(rng: random.Random, data: bytearray) -> bytearray:
    """A block of 512 bytes, by zeros or by another one."""
    blocks = len(data) // 512
    if blocks > 1:
        to, source = rng.randrange(blocks) * 512, rng.randrange(blocks) * 512
        data[to : to + 512] = rng.choice([bytes(512), data[source : source + 512]])
    return data


def tar_field(rng: random.Random, data: bytearray) -> bytearray:
    """A field of a tar header, with the checksum that fits."""
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return data
    at = rng.choice(headers)
    start, end = rng.choice([(0, 100), (124, 136), (156, 157), (257, 265), (345, 500)])
    filling = rng.choice(
        [
            rng.choice(
                ["0.txt", "../a.txt", "a\nb.txt", "k.1.jpg", "x" * 99, ".", "a/.b.c", "\udc80.txt"]
            ).encode("utf-8", "surrogateescape"),
            f"{rng.choice(_INTEGERS):o}".encode()[-11:],
            rng.choice([b"\x80", b"\xff"]) + rng.randbytes(11),
            bytes([rng.choice(b"01234567xgLKSMVND\0")]),
            rng.randbytes(20),
        ]
    )
    data[at + start : at + end] = filling[: end - start].ljust(end - start, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()
    return data


def json_value(rng: random.Random, data: bytearray) -> bytearray:
    """A number or a string of a JSON text, by one that is an edge."""
    text = data.decode("latin-1")
    found = list(re.finditer(r'-?\d+(\.\d+)?|"[^"]*"', text))
    if not found:
        return data
    match = rng.choice(found)
    value = rng.choice(_NUMBERS + _STRINGS)
    if rng.random() < 0.2:
        value = "[" * (depth := rng.choice([1, 60, 70, 500, 5000])) + value + "]" * depth
    replaced = text[: match.start()] + value.encode().decode("latin-1") + text[match.end() :]
    return bytearray(replaced.encode("latin-1"))


def safetensors_header(rng: random.Random, data: bytearray) -> bytearray:
    """A value of the header, whose length is then right or a little wrong."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return data
    header = json_value(rng, bytearray(data[8 : 8 + length]))
    stated = len(header) + rng.choice([0, 0, 0, 0, 1, -1])
    return bytearray(max(0, stated).to_bytes(8, "little")) + header + data[8 + length :]


BLIND: tuple[Mutation, ...] = (flip, overwrite, integer, cut, repeat)


def mutate(rng: random.Random, seed: bytes, further: tuple[Mutation, ...] = ()) -> bytes:
    """One to six mutations of a seed."""
    data = bytearray(seed)
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        data = rng.choice(BLIND + further * 2)(rng, data)
        if len(data) > 1 << 20:
            del data[1 << 20 :]
    return bytes(data)
