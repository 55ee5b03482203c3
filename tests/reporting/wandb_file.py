"""What an offline run of Weights & Biases left in its `.wandb` file: records of protobuf in a LevelDB log."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_HEADER = struct.Struct("<IHB")  # checksum, length, kind: whole, first, middle, last


def records(file: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + _HEADER.size <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER.size:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        parts += data[position : position + length]
        position += length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(file: Path) -> list[dict[str, Any]]:
    """The rows of the run, with their `_step`."""
    rows: list[dict[str, Any]] = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = {("/".join(i.nested_key) or i.key): json.loads(i.value_json) for i in record.history.item}
            rows.append(items | {"_step": record.history.step.num})
    return rows


def run_id(file: Path) -> str:
    return next(r.run.run_id for r in records(file) if r.WhichOneof("record_type") == "run")
