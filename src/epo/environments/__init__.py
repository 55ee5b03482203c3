"""Environments: the contract, the suites by name, and the pool that plays many episodes at once."""

from __future__ import annotations

from epo.environments.base import TaskSuite, TextEnv
from epo.environments.registry import make_suite, register_suite, suite_names

__all__ = ["TaskSuite", "TextEnv", "make_suite", "register_suite", "suite_names"]
