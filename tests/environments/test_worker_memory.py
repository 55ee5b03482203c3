"""How many workers the memory holds, and how much of it a control group leaves."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from epo.environments import worker_memory
from epo.environments.registry import make_suite
from epo.environments.worker_memory import memory_problem, usable_memory, worker_megabytes

WHOLE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 2**20


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (None, {}, WHOLE),  # no such interface
        ("0::/\n", {}, WHOLE),
        ("0::/\n", {"memory.max": "max\n"}, WHOLE),
        ("0::/job/step\n", {"job/step/memory.max": f"{64 * MIB}\n"}, 64 * MIB),
        ("0::/job/step\n", {"job/step/memory.max": "max\n", "job/memory.max": f"{32 * MIB}\n"}, 32 * MIB),
        ("0::/seen/outside/only\n", {"memory.max": f"{16 * MIB}\n"}, 16 * MIB),  # within a container
        ("3:cpu,memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": f"{8 * MIB}\n"}, 8 * MIB),
        ("3:memory:/a/b\n", {"memory/memory.limit_in_bytes": f"{4 * MIB}\n"}, 4 * MIB),
        ("3:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, WHOLE),
        ("3:cpu:/a\n", {"memory/a/memory.limit_in_bytes": f"{MIB}\n"}, WHOLE),  # of others
    ],
)
def test_the_narrowest_control_group_counts(
    own: str | None, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    groups = tmp_path / "groups"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    monkeypatch.setattr(worker_memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(worker_memory, "_GROUPS", groups)
    assert usable_memory() == expected


@pytest.mark.parametrize("worker_mb", [10, 316])
def test_the_number_that_is_advised_is_the_largest_that_fits(worker_mb: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_memory, "usable_memory", lambda: 4096 * MIB)
    problem = memory_problem("maze", worker_mb, workers=512)
    assert problem is not None and "'maze'" in problem and "environment.workers=512" in problem
    advised = re.search(r"set it to (\d+) or fewer", problem)
    assert advised is not None
    assert memory_problem("maze", worker_mb, workers=int(advised[1])) is None
    assert memory_problem("maze", worker_mb, workers=int(advised[1]) + 1) is not None


def test_suites_state_what_a_worker_takes():
    assert worker_megabytes("corridor", {}) == 10
    assert worker_megabytes("corridor", {"lenght": 3}) is None and worker_megabytes("nowhere", {}) is None
    assert make_suite("scienceworld", {"jvm_memory_mb": 128}).worker_mb < make_suite("scienceworld").worker_mb
    assert make_suite("household").worker_mb > make_suite("corridor").worker_mb
