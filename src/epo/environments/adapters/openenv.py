"""Environments behind an OpenEnv server (Meta and Hugging Face, https://github.com/meta-pytorch/OpenEnv)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit

from epo.environments.adapters._openenv_session import Refusal, Reply, Session, begin, fetch
from epo.environments.adapters._shared import SeededSuite, encodable
from epo.environments.base import TextEnv
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task

_FIELD = re.compile(r"\{([A-Za-z_][\w.]*)\}")
_INTEGER = re.compile(r"[+-]?\d{1,18}")
WHOLE = "*"
"""`action_field` of an agent that writes the whole action."""


class OpenEnvSuite(SeededSuite):
    """An OpenEnv server's environment. A task is a seed; every episode is a session of its own on the server.

    An episode succeeds when the server says `done` and its last reward is at least `success_reward`, or `success_field`
    is true. The agent's reward is 1 for success and 0 otherwise. Whether a seed decides what a reset gives is up to the
    server: `epo env check openenv` says so where it does not.

    Args:
        url: the server, on this machine or wherever you say.
        goal: the instruction in words; `{field}` stands for a field of the first observation.
        action_field: the action's field that carries the agent's text; by default the only field that the server's
            schema requires, or the only one there is. `*`: the agent writes the whole action, as a JSON object.
        action: the action's other fields.
        observation: what the agent reads, `{field}` and `{field.inner}` standing for fields of the observation; by
            default its only text, else every field on a line.
        actions_field: the observation's field that lists what may be done.
        success_reward: the last reward that means full success.
        success_field: the observation's field that says so instead.
        options: arguments of the server's reset, the seed aside.
        train: tasks in `train`.
        iid: tasks in `iid`.
        ood: tasks in `ood`, where `ood_options` are given.
        ood_options: arguments in place of `options` in `ood`; without them there is no such split.
        seed: the first task's seed.
        answer_seconds: limit for every answer of the server.

    Raises:
        UserError: an option out of its range.
    """

    name = "openenv"
    library = ("websockets", "openenv")

    def __init__(
        self,
        *,
        url: str = "http://127.0.0.1:8000",
        goal: str = "",
        action_field: str | None = None,
        action: dict[str, Any] | None = None,
        observation: str | None = None,
        actions_field: str | None = None,
        success_reward: float = 1.0,
        success_field: str | None = None,
        options: dict[str, Any] | None = None,
        train: int = 64,
        iid: int = 32,
        ood: int = 32,
        ood_options: dict[str, Any] | None = None,
        seed: int = 0,
        answer_seconds: float = 30.0,
    ) -> None:
        try:
            parts = urlsplit(url)
            complete = parts.scheme in ("http", "https", "ws", "wss") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            complete = False
        if not complete:
            raise UserError(f"suite {self.name!r}: option 'url' must be like http://127.0.0.1:8000, not {url!r}")
        if "seed" in {**(options or {}), **(ood_options or {})}:
            raise UserError(f"suite {self.name!r}: 'seed' is the suite's own; leave it out of the options")
        if not answer_seconds > 0:
            raise UserError(f"suite {self.name!r}: option 'answer_seconds' must be above 0, not {answer_seconds}")
        super().__init__(
            goal="openenv", seed=seed, train=train, iid=iid, ood=ood, options=options, ood_options=ood_options
        )
        self._url, self._seconds = url, answer_seconds
        self._shape = {
            "goal": goal,
            "action_field": action_field,
            "action": action or {},
            "observation": observation,
            "actions_field": actions_field,
            "success_reward": success_reward,
            "success_field": success_field,
        }

    def make_env(self) -> OpenEnvEnv:
        return OpenEnvEnv(self._url, seconds=self._seconds, options=self._options, **self._shape)

    def prepare(self) -> None:
        with self.make_env() as env:
            for split in self.splits:
                try:
                    env.reset(self._tasks[split][0])
                except EnvironmentFailure as failure:
                    raise UserError(
                        f"suite {self.name!r}: {failure}; start the server, or name it with environment.options.url"
                    ) from None

    def provenance(self) -> dict[str, Any]:
        said = fetch(self._url, "/metadata", seconds=self._seconds)
        return {
            "url": self._url,
            "environment": said.get("name"),
            "version": said.get("version"),
            "options": self._options,
        }


class OpenEnvEnv(TextEnv):
    """Plays one session after the other. Options: `OpenEnvSuite`."""

    def __init__(
        self,
        url: str,
        *,
        seconds: float,
        goal: str,
        action_field: str | None,
        action: Mapping[str, Any],
        observation: str | None,
        actions_field: str | None,
        success_reward: float,
        success_field: str | None,
        options: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._url, self._seconds = url, seconds
        self._goal, self._observation, self._actions_field = goal, observation, actions_field
        self._field, self._rest = action_field, dict(action)
        self._success_reward, self._success_field = success_reward, success_field
        self._options = options
        self._schema: dict[str, Any] | None = None
        self._session: Session | None = None
        self._last = Observation(text="")

    def reset(self, task: Task) -> Observation:
        self.close()
        if self._schema is None:
            self._learn()
        session, reply = begin(self._url, seconds=self._seconds, data={**self._options[task.split], "seed": task.seed})
        self._session = session
        if reply.done:
            self.close()
            raise EnvironmentFailure(f"{self._url}: the episode of seed {task.seed} is over before it begins")
        goal = self._fill(self._goal, reply) if self._goal else "Do what the environment asks for."
        self._last = self._observe(reply)
        return Observation(text=self._last.text, admissible_actions=self._last.admissible_actions, goal=goal)

    def step(self, action: str) -> Step:
        if self._session is None:
            raise RuntimeError("the episode is over: call reset first")
        payload = self._payload(encodable(action))
        if isinstance(payload, Refusal):
            return self._refuse(payload)
        try:
            reply = self._session.ask("step", payload)
        except EnvironmentFailure:
            self._session = None
            raise
        if isinstance(reply, Refusal):
            return self._refuse(reply)
        self._last = self._observe(reply)
        success = reply.done and self._succeeds(reply)
        if reply.done:
            self.close()
        return Step(
            observation=Observation(
                text=self._last.text, admissible_actions=() if reply.done else self._last.admissible_actions
            ),
            reward=float(success),
            terminated=reply.done,
            success=success,
            score=float(success),
        )

    def close(self) -> None:
        if self._session is not None:
            self._session.end()
        self._session = None

    def _learn(self) -> None:
        """Read the action's schema, and find the field that carries the text."""
        found = fetch(self._url, "/schema", seconds=self._seconds).get("action")
        schema = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
        fields = {name: kind for name, kind in _table(schema.get("properties")).items() if name != "metadata"}
        if self._field is None:
            needed = [name for name in fields if name in _entries(schema.get("required"))]
            free = [name for name in needed or fields if name not in self._rest]
            # Without a schema nobody is there, or an older server: the reset will tell, and a step needs the name.
            if len(free) == 1:
                self._field = free[0]
            elif fields:
                raise UserError(
                    f"suite 'openenv': option 'action_field' must say which of {', '.join(fields)} carries the agent's"
                    f" text, or {WHOLE!r} for an agent that writes all of them as JSON"
                )
            elif schema:
                raise UserError(f"suite 'openenv': the actions of {self._url} have no field that could carry text")
        elif schema and self._field != WHOLE and self._field not in fields:
            raise UserError(
                f"suite 'openenv': option 'action_field': the action has no field {self._field!r}, only"
                f" {', '.join(fields)}"
            )
        if schema:
            self._schema = {name: _resolved(kind, _table(schema.get("$defs"))) for name, kind in fields.items()}

    def _payload(self, text: str) -> dict[str, Any] | Refusal:
        """The action as the server takes it."""
        if self._field == WHOLE:
            try:
                said = json.loads(text)
            except (ValueError, RecursionError) as error:
                return Refusal(f"an action is one JSON object ({error})")
            if not isinstance(said, dict):
                return Refusal("an action is one JSON object")
            return {**self._rest, **cast("dict[str, Any]", said)}
        if self._field is None:
            raise UserError(
                f"suite 'openenv': {self._url} has no /schema; option 'action_field' must say which field of an action"
                " carries the agent's text"
            )
        kind = _table((self._schema or {}).get(self._field)).get("type")
        value: Any = text
        if kind == "integer":
            if not _INTEGER.fullmatch(text.strip()):
                return Refusal("an action is a whole number")
            value = int(text)
        elif kind == "number":
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                return Refusal("an action is a number")
        elif kind not in (None, "string"):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                return Refusal(f"an action is JSON of the kind {kind} ({error})")
        return {**self._rest, self._field: value}

    def _refuse(self, refusal: Refusal) -> Step:
        text = f"That is no action here: {refusal.words}."
        observation = Observation(text=text, admissible_actions=self._last.admissible_actions)
        return Step(observation=observation, reward=0.0, terminated=False, understood=False)

    def _observe(self, reply: Reply) -> Observation:
        shown = {name: value for name, value in reply.observation.items() if name != "metadata"}
        texts = [value for value in shown.values() if isinstance(value, str)]
        if self._observation is not None:
            text = self._fill(self._observation, reply)
        elif len(texts) == 1:
            text = texts[0]
        else:
            text = "\n".join(f"{name}: {_words(value)}" for name, value in shown.items())
        actions = None
        if self._actions_field is not None:
            listed = self._at(self._actions_field, reply, "actions_field")
            if not isinstance(listed, list):
                raise UserError(
                    f"suite 'openenv': option 'actions_field': {self._actions_field!r} is {_words(listed)[:100]}, not a"
                    " list"
                )
            actions = tuple(map(_words, cast("list[Any]", listed)))
        elif self._field and (choices := _entries(_table((self._schema or {}).get(self._field)).get("enum"))):
            actions = tuple(map(_words, choices))
        return Observation(text=encodable(text), admissible_actions=actions)

    def _succeeds(self, reply: Reply) -> bool:
        if self._success_field is None:
            return reply.reward >= self._success_reward
        return self._at(self._success_field, reply, "success_field") is True

    def _fill(self, template: str, reply: Reply) -> str:
        return encodable(_FIELD.sub(lambda found: _words(self._at(found[1], reply, "observation")), template))

    def _at(self, path: str, reply: Reply, option: str) -> Any:
        """What stands in the observation at `field.inner`; `reward` and `done` count as fields of it."""
        value: Any = {"reward": reply.reward, "done": reply.done, **reply.observation}
        for name in path.split("."):
            if name not in (inner := _table(value)):
                raise UserError(
                    f"suite 'openenv': option {option!r}: the observation has no field {path!r}; there are"
                    f" {', '.join(inner) or 'none'}"
                )
            value = inner[name]
        return value


def _table(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _entries(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _resolved(kind: Any, definitions: Mapping[str, Any]) -> dict[str, Any]:
    """A field's schema, one reference followed, and of `X or null` the X: what pydantic makes of a plain field."""
    found = _table(kind)
    options = [_table(option) for option in _entries(found.get("anyOf")) if _table(option).get("type") != "null"]
    if len(options) == 1:
        found = options[0]
    return _table(definitions.get(str(found.get("$ref")).rpartition("/")[2])) or found


def _words(value: Any) -> str:
    return encodable(value) if isinstance(value, str) else json.dumps(value)
