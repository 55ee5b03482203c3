"""What the workers of a suite hold together, against the memory that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from epo.environments.registry import make_suite
from epo.errors import UserError

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def usable_memory() -> int:
    """Bytes: the machine's memory, or less where a control group (a container, a batch system) allows less."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_limits()])


def worker_megabytes(suite_name: str, options: Mapping[str, Any]) -> int | None:
    """MiB of one worker (`TaskSuite.worker_mb`); None where the suite cannot be built here."""
    try:
        return make_suite(suite_name, options).worker_mb
    except UserError:
        return None


def memory_problem(suite_name: str, worker_mb: int, *, workers: int) -> str | None:
    """Why so many workers cannot be had here, and how many can; None where they fit."""
    usable = usable_memory() >> 20
    if workers * worker_mb <= usable:
        return None
    return (
        f"environment.workers={workers}: a worker of suite {suite_name!r} takes about {worker_mb} MiB, all of them "
        f"{workers * worker_mb / 1024:.1f} GiB, and there are {usable / 1024:.1f} GiB here: set it to "
        f"{max(1, usable // worker_mb)} or fewer"
    )


def _group_limits() -> Iterator[int]:
    """Those of this process's control groups and all groups around them, in both versions of the interface."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, file = _GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, file = _GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / name.lstrip("/")
        for folder in [group, *group.parents][: len(group.parts) - len(root.parts) + 1]:
            try:
                text = (folder / file).read_text(encoding="utf-8").strip()
            except OSError:  # a container sees its own group as the root
                continue
            if text.isdigit():  # and not "max"
                yield int(text)
