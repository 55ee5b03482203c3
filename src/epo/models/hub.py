"""Models of the Hugging Face hub by their name: configuration, tokenizer and safetensors, never code or pickles."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epo.errors import UserError

FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
]
"""What is downloaded, from the top folder of a repository only."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

_offline_on_our_account = False


def stay_offline_unless_asked() -> None:
    """Keep the model libraries from looking for updates and models on the network of their own accord.

    Only `download`, which a user asks for by naming a model of the hub, lifts this, and not where the user's own
    environment says offline. Call it before those libraries are imported.
    """
    global _offline_on_our_account
    if not any(os.environ.get(name) for name in _SWITCHES):
        os.environ["HF_HUB_OFFLINE"] = "1"
        _offline_on_our_account = True


def is_hub_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def local_or_download(name: str) -> Path:
    """What `model.path=name` stands for: the copy on this machine if it is complete, else a download.

    A copy is never updated unasked.

    Raises:
        UserError: cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    what = f"model.path={name!r} is not a directory, and as a model of the Hugging Face hub it"
    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns="*/*", local_files_only=True))
    except Exception:  # whatever it is, downloading it tells the user
        return download(name, what=what)
    return folder if _is_complete(folder) else download(name, what=what)


def _is_complete(folder: Path) -> bool:
    """A download that was interrupted leaves the files that had come."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        weights = {str(name) for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        weights = {"model.safetensors"}
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return has_tokenizer and all((folder / name).is_file() for name in ("config.json", *weights))


def download(name: str, *, what: str | None = None) -> Path:
    """Bring the newest version of `name` into the cache of huggingface_hub; returns its folder.

    Args:
        what: how an error message begins.

    Raises:
        UserError: no such model, no access, no network, or no safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    what = what or f"the model {name!r} of the Hugging Face hub"
    elsewhere = "or copy a model directory here and give its path"
    try:
        with _online():
            folder = Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns="*/*"))
    except GatedRepoError:
        raise UserError(
            f"{what} needs your consent: accept its terms on its page, log in with `hf auth login`, {elsewhere}"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{what} does not exist or is private: check the spelling, log in with `hf auth login`, {elsewhere}"
        ) from None
    except Exception as error:  # a dozen kinds of network and disk errors, of three libraries
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{what} cannot be downloaded ({reason}): go online and unset HF_HUB_OFFLINE, {elsewhere}"
        ) from None
    if not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{what} has no weights in safetensors: convert them (pickled weights are not read), {elsewhere}"
        )
    return folder


@contextmanager
def _online() -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if _offline_on_our_account:
        constants.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
