"""Fixtures for training: minute runs in the corridor."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from epo.config import Config
from epo.environments import register_suite
from epo.recipe import load_config
from minute_run import MINUTE_RUN, cache, own_cache  # noqa: F401  # fixtures

register_suite("failing", "failing_suite:FailingSuite")


@pytest.fixture(scope="session")
def minute_config() -> Callable[..., Config]:
    """`minute_config("steps=2", ...)`: four steps of four episodes in short corridors, with overrides."""
    more = ("steps=4", "rollout.tasks_per_step=4", "evaluation.every=2", "evaluation.episodes=4", "checkpoint.every=3")

    def make(*overrides: str) -> Config:
        return load_config("base", [*MINUTE_RUN, *more, *overrides])

    return make
