"""Tokens of one RL step: what is read, drawn, and run through the learner."""

from __future__ import annotations

from dataclasses import dataclass

from epo.config import Config

# First prompt and what is read after each later turn, in tokens. A least-squares fit of tokens/processed over turns of
# kept runs (benchmarks/plan_check.py): scienceworld with the embedded tokenizer and with SmolLM2's.
_MEASURED = {("scienceworld", True): (207, 29), ("scienceworld", False): (186, 75)}
_ASSUMED = {"alfworld": (300, 60), "household": (200, 40), "corridor": (120, 40)}
_LISTED_ACTIONS = 200
"""Assumed length of the list of admissible actions."""
_ACTION = 8
"""Tokens of an action by itself; the kept runs have 5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumption:
    """What a recipe does not say and a plan needs."""

    value: float
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One RL step."""

    episodes: int
    turns: float
    """Of an episode."""
    prefilled: float
    """Tokens read by the sampler in a step; what it keeps in its cache is not read again."""
    decoded: float
    processed: float
    """Tokens of all rows: what one pass of the learner runs through the model."""
    rows: float
    context: float
    """Mean length of what a drawn token looks back on."""
    pairs: float
    """Of positions that causality lets see each other, in one pass over all rows."""
    live: int
    """Episodes played at once."""
    assumptions: dict[str, Assumption]

    @property
    def row(self) -> float:
        """Tokens of a row, on average."""
        return self.processed / self.rows


def workload_of(
    config: Config,
    *,
    turns: float | None = None,
    response: float | None = None,
    observation: float | None = None,
    prompt: float | None = None,
) -> Workload:
    """What one step of `config` reads and draws.

    Args:
        turns: of an episode; at most `environment.max_turns`.
        response: tokens of a response.
        observation: tokens read after each turn but the first, list of actions and template included.
        prompt: tokens of an episode's first prompt, first observation included.
    """
    agent, environment = config.agent, config.environment
    key = (environment.suite, config.model.path == "tiny")
    measured = _MEASURED.get(key)
    first, later = measured or _ASSUMED.get(environment.suite, (200, 60))
    source = "fitted to kept runs" if measured else "assumed"
    if agent.list_actions:
        first, later, source = first + _LISTED_ACTIONS, later + _LISTED_ACTIONS, source + ", actions listed"
    usual = min(agent.max_response_tokens, _ACTION)
    if agent.format == "think_action":
        usual = agent.max_response_tokens / 2
    assumptions = {
        "turns": _given(turns, environment.max_turns, "environment.max_turns, an upper bound"),
        "response_tokens": _given(
            response, usual, "half the limit, assumed" if agent.format == "think_action" else "an action, assumed"
        ),
        "observation_tokens": _given(observation, later, source),
        "prompt_tokens": _given(prompt, first, source),
    }
    t, r, o, p = (assumptions[name].value for name in assumptions)
    limit = config.model.max_context
    p = min(p, limit - r) if limit > r else 1.0
    episodes = config.rollout.tasks_per_step * config.rollout.group_size
    live = min(episodes, environment.workers)
    if agent.context == "window":
        return _window(t, r, o, p, limit=limit, window=agent.window, episodes=episodes, live=live, of=assumptions)
    length = p + t * r + (t - 1) * o
    pieces = 1.0
    if length > limit:
        if agent.overflow == "end":
            t = max(1.0, (limit - p + o) / (r + o))
            assumptions["turns"] = Assumption(value=t, source=f"as many as model.max_context={limit} holds")
            length = p + t * r + (t - 1) * o
        else:
            pieces = length / limit
    row = length / pieces
    return Workload(
        episodes=episodes,
        turns=t,
        prefilled=episodes * (p + (t - 1) * o),
        decoded=episodes * t * r,
        processed=episodes * length,
        rows=episodes * pieces,
        context=(p + row) / 2,
        pairs=episodes * pieces * row * (row + 1) / 2,
        live=live,
        assumptions=assumptions,
    )


def _window(
    t: float, r: float, o: float, p: float, *, limit: int, window: int, episodes: int, live: int,
    of: dict[str, Assumption],
) -> Workload:  # fmt: skip
    """A row per turn: the first prompt's text, the observation in its new place, and the last pairs."""
    pair = o + min(r, _ACTION)
    whole = int(t)
    prompts = [min(p + min(turn, window) * pair, limit - r) for turn in range(whole)]
    last = min(p + min(whole, window) * pair, limit - r) * (t - whole)
    read = sum(prompts) + last
    lengths = [prompt + r for prompt in prompts]
    pairs = sum(x * (x + 1) / 2 for x in lengths) + (last + r * (t - whole)) * (lengths[-1] + 1) / 2
    return Workload(
        episodes=episodes,
        turns=t,
        prefilled=episodes * read,
        decoded=episodes * t * r,
        processed=episodes * (read + t * r),
        rows=episodes * t,
        context=read / t + r / 2,
        pairs=episodes * pairs,
        live=live,
        assumptions=of,
    )


def _given(value: float | None, otherwise: float, source: str) -> Assumption:
    return Assumption(value=otherwise, source=source) if value is None else Assumption(value=value, source="given")
