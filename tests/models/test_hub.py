"""Models of the Hugging Face hub: only harmless files come, once; what cannot come is one message."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from epo.models.hub import is_hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE"}
UNWANTED = {
    "pytorch_model.bin",
    "modeling_llama.py",
    "training_args.bin",
    "consolidated.safetensors",
    "onnx/model.safetensors",
    "tokenizer/tokenizer.json",
    "model.pkl",
}
PICKLED = {"config.json", "tokenizer.json", "pytorch_model.bin"}
REPOSITORIES = {"org/good": WANTED | UNWANTED, "org/pickled": PICKLED}


def content(name: str) -> bytes:
    return f"this is {name}".encode()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        for repository, files in REPOSITORIES.items():
            if path.startswith(f"/api/models/{repository}/revision/"):
                return self.answer({"id": repository, "sha": COMMIT, "siblings": []})
            if path.startswith(f"/api/models/{repository}/tree/"):
                return self.answer([self.entry(name) for name in sorted(files)])
            if path.startswith(f"/{repository}/resolve/{COMMIT}/"):
                name = path.removeprefix(f"/{repository}/resolve/{COMMIT}/")
                return self.send(200, content(name), {"ETag": f'"{self.etag(name)}"', "X-Repo-Commit": COMMIT})
        if path.startswith("/api/models/org/gated"):
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    @staticmethod
    def etag(name: str) -> str:
        return hashlib.sha1(content(name)).hexdigest()

    def entry(self, name: str) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(content(name)), "oid": self.etag(name)}

    def answer(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHub", (Hub,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def run(code: str, home: Path, endpoint: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its settings once, when it is imported."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**inherited, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


PULL = "from epo.cli import main; main()"
RESOLVE = """
import sys
from epo.errors import UserError
from epo.models import resolve_model
from epo.models.hub import stay_offline_unless_asked
stay_offline_unless_asked()
for name in sys.argv[1:]:
    try:
        print(resolve_model(name))
    except UserError as error:
        print("error:", error)
"""


def test_only_harmless_files_come_and_they_come_once(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    done = run(PULL, tmp_path, endpoint, "models", "pull", "org/good", "--json")
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["folder"])
    assert {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} == WANTED
    assert all((folder / name).read_bytes() == content(name) for name in WANTED)
    assert not any(path.endswith(name) for path in asked for name in UNWANTED)
    # As model.path it is the same folder, and nothing is asked any more.
    asked.clear()
    found = run(RESOLVE, tmp_path, endpoint, "org/good")
    assert (found.stdout.strip(), asked) == (str(folder), [])
    # A copy that lacks a file is completed.
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
        found = run(RESOLVE, tmp_path, endpoint, "org/good")
        assert found.stdout.strip() == str(folder)
        assert (folder / name).read_bytes() == content(name)


def test_what_cannot_come(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    found = run(RESOLVE, tmp_path, endpoint, "org/none", "org/gated", "org/pickled")
    none, gated, pickled = found.stdout.splitlines()
    assert none.startswith("error: model.path='org/none' is not a directory, and as a model of the Hugging Face hub")
    assert "check the spelling" in none
    assert "accept its terms on its page, log in with `hf auth login`" in gated
    assert "has no weights in safetensors" in pickled
    assert not any(path.endswith(".bin") for path in asked)


def test_offline(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    found = run(RESOLVE, tmp_path, endpoint, "org/good", HF_HUB_OFFLINE="1")
    assert found.stdout.startswith("error: model.path='org/good'")
    assert "go online and unset HF_HUB_OFFLINE, or copy a model directory here and give its path" in found.stdout
    assert asked == []
    failed = run(PULL, tmp_path, "http://127.0.0.1:9", "models", "pull", "org/good")  # nobody listens there
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: the model 'org/good' of the Hugging Face hub cannot be downloaded (")
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", True),
        ("org/a_b", True),
        ("runs/try1/policy", False),
        ("/org/name", False),
        ("org", False),
        ("../name", False),
        ("org/..", False),
        ("org/name\n", False),
    ],
)
def test_names(name: str, expected: bool) -> None:
    assert is_hub_name(name) is expected
