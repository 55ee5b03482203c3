"""GGUF files written by the tests, byte by byte as the format's description has them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8


class Typed(NamedTuple):
    """A metadata value with the number of its type; `items` says that it is an array of them."""

    kind: int
    value: Any
    items: bool = False


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    """Slowest dimension first."""
    kind: int
    data: bytes


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def one(kind: int, value: Any) -> bytes:
    return string(value) if kind == 8 else struct.pack("<" + FORMATS[kind], value)


def typed(value: Typed) -> bytes:
    if not value.items:
        return struct.pack("<I", value.kind) + one(value.kind, value.value)
    entries = b"".join(one(value.kind, item) for item in value.value)
    return struct.pack("<IIQ", 9, value.kind, len(value.value)) + entries


def gguf(
    metadata: dict[str, Typed], tensors: dict[str, Tensor], *, version: int = 3, alignment: int = 32
) -> tuple[bytes, int]:
    """The file, and the length of its header."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(string(key) + typed(value) for key, value in metadata.items())
    body = b""
    for name, tensor in tensors.items():
        header += string(name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        header += struct.pack("<IQ", tensor.kind, len(body))
        body += tensor.data + b"\0" * (-len(tensor.data) % alignment)
    return header + b"\0" * (-len(header) % alignment) + body, len(header)


def f32(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)
