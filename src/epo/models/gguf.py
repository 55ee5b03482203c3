"""Reading GGUF, the file format of llama.cpp: metadata, and tensors as float32.

Nothing a file says is believed before it is checked against the size of the file, so that a damaged one is an error and
never a crash, a hang or a huge allocation.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; block layouts: ggml-common.h of the same repository.

Legend: N blocks of 32 weights, H the 16 bytes that hold the nibbles of a block.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from epo.errors import UserError

VERSIONS = (2, 3)
"""2 and 3 are read alike on little-endian machines; 1 counts in 32 bits and is extinct."""

_BLOCK = 32
_MAX_DIMENSIONS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}

_Q8_0 = np.dtype([("scale", "<f2"), ("weights", "i1", _BLOCK)])
_Q4_1 = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", _BLOCK // 2)])


def _from_q8_0(blocks_N: NDArray[Any]) -> NDArray[np.float32]:
    scale_N1 = blocks_N["scale"].astype(np.float32)[:, None]
    return blocks_N["weights"].astype(np.float32) * scale_N1


def _from_q4_1(blocks_N: NDArray[Any]) -> NDArray[np.float32]:
    """The low nibbles are the first 16 weights of a block, the high nibbles the others."""
    nibbles_N_H = blocks_N["nibbles"]
    weights = np.concatenate([nibbles_N_H & 15, nibbles_N_H >> 4], axis=1).astype(np.float32)
    weights *= blocks_N["scale"].astype(np.float32)[:, None]
    weights += blocks_N["minimum"].astype(np.float32)[:, None]
    return weights


@dataclass(frozen=True, slots=True)
class _TensorType:
    name: str
    layout: np.dtype[Any]
    per_item: int
    """Weights that one item of the layout holds."""
    dequantise: Callable[[NDArray[Any]], NDArray[np.float32]]


def _as_float32(items: NDArray[Any]) -> NDArray[np.float32]:
    return items.astype(np.float32)


_TYPES = {
    0: _TensorType("F32", np.dtype("<f4"), 1, _as_float32),
    1: _TensorType("F16", np.dtype("<f2"), 1, _as_float32),
    3: _TensorType("Q4_1", _Q4_1, _BLOCK, _from_q4_1),
    8: _TensorType("Q8_0", _Q8_0, _BLOCK, _from_q8_0),
}
_OTHER_TYPES = {
    2: "Q4_0",
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    30: "BF16",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]
    """Slowest dimension first, as numpy and PyTorch have it; the file has them the other way round."""
    type: str
    """F32, F16, Q4_1 or Q8_0."""
    offset: int
    """Bytes from the beginning of the file."""


class GGUFFile:
    """The header of a GGUF file, and its tensors on demand.

    `metadata` maps keys to numbers, booleans, strings, lists of strings, or arrays of numbers.

    Raises:
        UserError: not a GGUF file, damaged, of another version, or with tensors of a type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Unmapped when the last reference goes.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise UserError(f"cannot read {str(path)!r} as GGUF ({error}): give a GGUF file") from None
        self._position = 0
        if self._take(4) != b"GGUF":
            self._refuse("it does not begin with the letters GGUF")
        version = self._number("<u4")
        if version not in VERSIONS:
            self._refuse(f"its version is {version}, and only {' and '.join(map(str, VERSIONS))} are read")
        num_tensors = self._count(smallest=24)
        num_keys = self._count(smallest=13)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in self.metadata:
                self._refuse(f"the key {key[:80]!r} is there twice")
            self.metadata[key] = self._value(self._number("<u4"))
        self._types: dict[str, _TensorType] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            self._tensor_info()
        self._place_tensors()

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32, in memory of its own. Every quantised weight is exactly scale * integer + minimum."""
        info, kind = self.tensors[name], self._types[name]
        num_items = math.prod(info.shape) // kind.per_item
        items = np.frombuffer(self._data, kind.layout, num_items, info.offset)
        return kind.dequantise(items).reshape(info.shape)

    def _tensor_info(self) -> None:
        name = self._string()
        if name in self.tensors:
            self._refuse(f"the tensor {name[:80]!r} is there twice")
        num_dimensions = self._number("<u4")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            self._refuse(f"the tensor {name[:80]!r} has {num_dimensions} dimensions")
        shape = tuple(self._number("<u8") for _ in range(num_dimensions))[::-1]
        number, offset = self._number("<u4"), self._number("<u8")
        if number not in _TYPES:
            found = _OTHER_TYPES.get(number, f"number {number}")
            known = ", ".join(kind.name for kind in _TYPES.values())
            raise UserError(
                f"the tensor {name[:80]!r} of {str(self.path)!r} is of type {found}, which is not read: "
                f"use a file whose tensors are {known}"
            )
        kind = _TYPES[number]
        if shape[-1] % kind.per_item or 0 in shape:
            self._refuse(f"the tensor {name[:80]!r} has the shape {shape}, which {kind.name} cannot have")
        self._types[name] = kind
        self.tensors[name] = TensorInfo(shape, kind.name, offset)

    def _place_tensors(self) -> None:
        """Turn offsets from the beginning of the data into offsets from the beginning of the file."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            self._refuse(f"general.alignment is {alignment!r}")
        start = -(-self._position // alignment) * alignment
        for name, info in self.tensors.items():
            kind = self._types[name]
            end = start + info.offset + math.prod(info.shape) // kind.per_item * kind.layout.itemsize
            if info.offset % alignment or end > len(self._data):
                self._refuse(f"the tensor {name[:80]!r} lies outside the file, which has {len(self._data)} bytes")
            self.tensors[name] = TensorInfo(info.shape, info.type, start + info.offset)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            self._refuse(f"a value is of type {kind}, which does not exist")
        value = self._number(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def _array(self) -> Any:
        kind = self._number("<u4")
        if kind == _STRING:
            return [self._string() for _ in range(self._count(smallest=8))]
        if kind not in _SCALARS:
            self._refuse(f"an array holds values of type {kind}, which is not read")
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self._take(self._count(smallest=dtype.itemsize) * dtype.itemsize), dtype)
        return values.astype(np.bool_) if kind == _BOOL else values

    def _string(self) -> str:
        try:
            return self._take(self._number("<u8")).decode("utf-8")
        except UnicodeDecodeError:
            self._refuse("a text is not UTF-8")

    def _count(self, *, smallest: int) -> int:
        """The length of a list whose entries take at least `smallest` bytes each."""
        count = self._number("<u8")
        if count * smallest > len(self._data) - self._position:
            self._refuse(f"it announces {count} entries, more than the file can hold")
        return count

    def _number(self, dtype: str) -> Any:
        code = _STRUCTS[dtype]
        return code.unpack(self._take(code.size))[0]

    def _take(self, size: int) -> bytes:
        end = self._position + size
        if end > len(self._data):
            self._refuse(f"it ends at byte {len(self._data)}, in the middle of its header")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{str(self.path)!r} is not a GGUF file that can be read ({reason}): get it again, completely")


_STRUCTS = {
    "<u1": struct.Struct("<B"),
    "<i1": struct.Struct("<b"),
    "<u2": struct.Struct("<H"),
    "<i2": struct.Struct("<h"),
    "<u4": struct.Struct("<I"),
    "<i4": struct.Struct("<i"),
    "<f4": struct.Struct("<f"),
    "<u8": struct.Struct("<Q"),
    "<i8": struct.Struct("<q"),
    "<f8": struct.Struct("<d"),
}
