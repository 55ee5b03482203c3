"""Runs that need the same warm start at the same time make it once, and all get it whole."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

from epo.files import exclusive, new_folder
from epo.recipe import load_config
from epo.training import demonstrations, imitation

PROCESSES = 4


def make_slowly(folder: Path, started: Any, *_: object, **__: object) -> None:
    with started.get_lock():
        started.value += 1
    with new_folder(folder) as draft:
        (draft / "one").write_text("1")
        time.sleep(0.2)
        (draft / "two").write_text("2")


def warm_start(found: Any, started: Any) -> None:
    """As a run does it, with a stand-in for the learning."""
    imitation._make = lambda folder, *_, **__: make_slowly(folder, started)  # pyright: ignore
    imitation.load_policy = lambda folder, _: found.put(sorted(p.name for p in folder.iterdir()))  # pyright: ignore
    imitation.warm_started_policy(load_config("base"), [])


def hold(path: Path, started: Any) -> None:
    with exclusive(path):
        started.value = 1
        time.sleep(60)


def test_one_makes_it_and_the_others_wait() -> None:
    context = multiprocessing.get_context("fork")
    found, started = context.Queue(), context.Value("i", 0)
    processes = [context.Process(target=warm_start, args=(found, started)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    assert [found.get(timeout=60) for _ in processes] == [["one", "two"]] * PROCESSES
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert started.value == 1


def test_a_dead_process_holds_nobody_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Value("i", 0)
    process = context.Process(target=hold, args=(tmp_path / "x", started))
    process.start()
    while not started.value:
        time.sleep(0.01)
    process.kill()
    with exclusive(tmp_path / "x"):
        process.join()


def test_demonstrations_are_played_once(tmp_path: Path, monkeypatch: Any) -> None:
    played: list[Path] = []

    def play(path: Path, *_: object, **__: object) -> None:
        played.append(path)
        path.write_text("[]")

    monkeypatch.setattr(demonstrations, "_play", play)
    from epo.environments.registry import make_suite

    suite, config = make_suite("corridor", {}), load_config("base", ["environment.suite=corridor"])
    for _ in range(2):
        assert demonstrations.collect_demonstrations(config, suite, None) == []  # pyright: ignore
    assert len(played) == 1
