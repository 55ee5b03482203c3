"""TextWorld's PDDL engine, contained and several times faster, without changing a byte of what it says.

Contained: importing alfworld sets an environment variable and makes a folder in the user's home, and the translator
overwrites `sys.argv`; both are undone here. Faster: the stock engine parses every grammar template and query anew at
each step, deep-copies the context for each symbol it derives, and translates each game from PDDL to SAS four times.
All of that is a pure function of text, so it is remembered. The packages stay as installed: functions are replaced in
this process only, so `install` is called where environments are made.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from epo.errors import UserError

PACKAGES = ("alfworld", "textworld", "fast-downward-textworld")
"""Distributions whose versions decide what an episode looks like."""
GAMES_KEPT = 64
"""Games whose grammar and translation are remembered in one process; a large kitchen takes about 4 MB."""
_MODULES = ("alfworld", "textworld", "fast_downward")


def require_packages() -> None:
    """Check, without importing anything, that the engine is installed.

    Raises:
        UserError: a package is missing; the message gives the pip command.
    """
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"Household tasks need the package{'s' * (len(missing) > 1)} {', '.join(missing)}, not installed here. "
            "Run: pip install -e '.[alfworld]'  (or, in a checkout and without spaCy: "
            "pip install --no-deps -r requirements/alfworld.txt)"
        )


@contextmanager
def contained() -> Iterator[None]:
    """Undo what alfworld and fast-downward do to `ALFWORLD_DATA` and `sys.argv`, and keep the former from the disk."""
    argv, data = sys.argv, os.environ.get("ALFWORLD_DATA")
    # alfworld creates the folder named here when it is imported, so name one that exists.
    os.environ["ALFWORLD_DATA"] = tempfile.gettempdir()
    try:
        yield
    finally:
        sys.argv = argv
        del os.environ["ALFWORLD_DATA"]
        if data is not None:
            os.environ["ALFWORLD_DATA"] = data


def new_engine() -> Any:
    """A TextWorld environment for ALFWorld games: `load(dict)`, `reset()`, `step(command)`; speaks ALFWorld's names.

    Each engine maps its own 33 MB copy of the planner library until the process ends: make one and reuse it.

    Raises:
        UserError: alfworld is not installed.
    """
    require_packages()
    with contained():
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

        install()
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        return AlfredDemangler(PddlEnv(infos), shuffle=False)


def install() -> None:
    """Replace the slow pure functions of `textworld` and `fast_downward` in this process. Idempotent."""
    with contained():
        import fast_downward
        import textworld.envs.pddl.logic as game_logic
        import textworld.envs.pddl.textgen as textgen
        from textworld.logic import Proposition, Rule

    if getattr(textgen, "_epo_memo", False):
        return
    textgen._epo_memo = True  # type: ignore[attr-defined]
    _memoise_grammar(textgen)
    # What these parsers give (a game's actions and production rules, a query) is only read, so it may be shared.
    game_logic._parse_and_convert = lru_cache(maxsize=GAMES_KEPT)(game_logic._parse_and_convert)
    Rule.parse_conjunctive_query = staticmethod(lru_cache(maxsize=4096)(Rule.parse_conjunctive_query))  # type: ignore[assignment]
    _speed_up_sorting(Proposition)
    _memoise_translation(fast_downward, game_logic.PddlState)


def _memoise_grammar(textgen: Any) -> None:
    parse = lru_cache(maxsize=65536)(textgen._parse_and_convert)

    def clone(symbol: Any) -> Any:
        twin = copy.copy(symbol)
        # Deriving a list sets the context of the symbol inside it, so the inner symbol must not be shared either.
        if isinstance(symbol, textgen.ListSymbol):
            twin.symbol = clone(symbol.symbol)
        elif isinstance(symbol, textgen.ConditionalSymbol):
            twin.expression = clone(symbol.expression)
        return twin

    def clone_all(symbols: list[Any]) -> list[Any]:
        return [clone(symbol) for symbol in symbols]

    def parse_and_convert(text: str, rule_name: str, trace: bool = False) -> list[Any]:
        return clone_all(parse(text, rule_name=rule_name))

    def copy_context(context: dict[str, Any]) -> dict[str, Any]:
        # The variables and the mapping's members are deep-copied by the stock engine, but only ever read.
        return {**context, "variables": dict(context["variables"]), "mapping": dict(context["mapping"])}

    def symbol_copy(self: Any, context: dict[str, Any]) -> Any:
        twin = clone(self)
        twin.context = copy_context(context)
        return twin

    textgen._parse_and_convert = parse_and_convert
    textgen.copy_context = copy_context
    textgen.Symbol.copy = symbol_copy
    # With the two above replaced, `deepcopy` has one caller left in that module: it copies the symbols of a rule.
    textgen.deepcopy = clone_all


def _speed_up_sorting(proposition: Any) -> None:
    compare = proposition.__lt__

    def less_than(self: Any, other: Any) -> Any:
        # The engine sorts facts of one signature, where the types are equal and the names alone decide.
        if isinstance(other, proposition) and self.signature is other.signature:
            return [v.name for v in self.arguments] < [v.name for v in other.arguments]
        return compare(self, other)

    proposition.__lt__ = less_than


def _memoise_translation(fast_downward: Any, state: Any) -> None:
    pddl2sas, replan = fast_downward.pddl2sas, state.replan

    @lru_cache(maxsize=GAMES_KEPT)
    def translate(domain: str, problem: str, optimize: bool) -> tuple[Any, str]:
        argv = sys.argv
        try:
            return pddl2sas(domain, problem, optimize=optimize)
        finally:
            sys.argv = argv

    def lazy_pddl2sas(domain: str, problem: str, verbose: bool = False, optimize: bool = False) -> tuple[Any, str]:
        # The optimised translation serves the planner alone, which an agent's episode never asks: see lazy_replan.
        return (None, "") if optimize else translate(domain, problem, False)

    def lazy_replan(self: Any, infos: Any) -> Any:
        if not self.sas_replan:
            _, self.sas_replan = translate(self._logic.domain, self.pddl_problem, True)
            self.downward_lib.load_sas_replan(self.sas_replan.encode("utf-8"))
        return replan(self, infos)

    fast_downward.pddl2sas = lazy_pddl2sas
    state.replan = lazy_replan
