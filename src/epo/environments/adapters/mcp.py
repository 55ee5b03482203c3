"""Tools of an MCP server as an environment (Model Context Protocol, https://modelcontextprotocol.io)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import urlsplit

from epo.environments.adapters._mcp_server import Result, ToolServer
from epo.environments.adapters._mcp_tasks import Call, ToolTask, read_tasks
from epo.environments.base import TaskSuite, TextEnv
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task

_FORM = 'Call one tool a turn, as JSON on one line: {"tool": NAME, "arguments": {...}}'


class McpSuite(TaskSuite):
    """Tasks for an agent with the tools of an MCP server. An action is one call, `{"tool": NAME, "arguments": {...}}`.

    Tasks are a file of JSON objects, one a line, with `goal`, `check` (a call with `equals` or `contains`; without
    either its result must be true), and perhaps `id`, `split` (`train`), `kind` (what reports group by), `setup` and
    `demonstration` (lists of calls). The check is made after every call of the agent, and success ends the episode;
    with `finish_tool` it is made once, when the agent calls that tool, and ends the episode either way.

    A server that is started by `command` lives for one episode, or for as long as its worker where `reset_tool` puts it
    back to its start. What tools do, they do with your rights: offer no tool that an agent must not call.

    Args:
        tasks: the file.
        command: the program that is the server and its arguments, as a list; never given to a shell.
        variables: environment variables of that program, which inherits hardly any.
        url: of a streamable HTTP server, instead of a command, on this machine or wherever you say.
        tools: names of those offered to the agent; by default all but `reset_tool`.
        reset_tool: called without arguments before every episode; a server by `url` needs one, or state per connection.
        finish_tool: a tool by which the agent says that it is done; one that the server does not have is added.
        max_result_characters: longer results are cut.
        answer_seconds: limit for the server's start and for every answer.

    Raises:
        UserError: an option out of its range, or a file that is none of tasks.
    """

    name = "mcp"
    library = ("mcp", "mcp")

    def __init__(
        self,
        *,
        tasks: str,
        command: list[str] | None = None,
        variables: dict[str, str] | None = None,
        url: str | None = None,
        tools: list[str] | None = None,
        reset_tool: str | None = None,
        finish_tool: str | None = None,
        max_result_characters: int = 4000,
        answer_seconds: float = 30.0,
    ) -> None:
        if (command is None) == (url is None):
            raise UserError(f"suite {self.name!r} needs one of the options 'command' and 'url'")
        if command is not None and not (command and command[0]):
            raise UserError(f"suite {self.name!r}: option 'command' must name a program, not {command!r}")
        if url is not None and urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"suite {self.name!r}: option 'url' must be like http://127.0.0.1:8000/mcp, not {url!r}")
        for option, value in [
            ("max_result_characters", max_result_characters - 1),
            ("answer_seconds", answer_seconds),
        ]:
            if not value > 0:
                raise UserError(f"suite {self.name!r}: option {option!r} must be above 0")
        self._identity: tuple[str, dict[str, dict[str, Any]]] | None = None
        self._path = Path(tasks)
        self._tasks = {task.id: task for task in read_tasks(self._path)}
        present = {task.split for task in self._tasks.values()}
        self.splits = tuple(s for s in ("train", "iid", "ood") if s in present) + tuple(
            sorted(present - {"train", "iid", "ood"})
        )
        self._server = {"command": command, "variables": variables or {}, "url": url, "seconds": answer_seconds}
        self._manner = {
            "tools": tools,
            "reset_tool": reset_tool,
            "finish_tool": finish_tool,
            "max_result_characters": max_result_characters,
        }

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise UserError(f"suite {self.name!r} has no split {split!r}; its splits: {', '.join(self.splits)}")
        return [
            Task(suite=self.name, id=task.id, split=split, goal=task.kind)
            for task in self._tasks.values()
            if task.split == split
        ]

    def make_env(self) -> McpEnv:
        return McpEnv(self._tasks, server=self._server, **self._manner)

    def prepare(self) -> None:
        with self.make_env() as env:
            try:
                self._identity = env.examine()
            except EnvironmentFailure as failure:
                raise UserError(f"suite {self.name!r}: {failure}") from None

    def provenance(self) -> dict[str, Any]:
        if self._identity is None:
            self.prepare()
        name, tools = self._identity or ("", {})
        return {
            "server": name,
            "tools_sha256": hashlib.sha256(json.dumps(tools, sort_keys=True).encode()).hexdigest(),
            "tasks_sha256": hashlib.sha256(self._path.read_bytes()).hexdigest(),
        }


class McpEnv(TextEnv):
    """Plays one task at a time. Options: `McpSuite`."""

    def __init__(
        self,
        tasks: Mapping[str, ToolTask],
        *,
        server: Mapping[str, Any],
        tools: list[str] | None,
        reset_tool: str | None,
        finish_tool: str | None,
        max_result_characters: int,
    ) -> None:
        self._tasks, self._how = tasks, server
        self._offered, self._reset_tool, self._finish_tool = tools, reset_tool, finish_tool
        self._longest = max_result_characters
        self._server: ToolServer | None = None
        self._tools: dict[str, dict[str, Any]] = {}
        self._task: ToolTask | None = None

    def examine(self) -> tuple[str, dict[str, dict[str, Any]]]:
        """Start a server, look whether it has every tool that options and tasks name, and return its name and tools.

        Raises:
            EnvironmentFailure: it does not start.
            UserError: it lacks one.
        """
        server = self._connect()
        known = server.tools()
        named = {"option 'tools'": self._offered or [], "option 'reset_tool'": [self._reset_tool or ""]}
        for task in self._tasks.values():
            calls = [*task.setup, task.check.call, *(task.demonstration or ())]
            named[f"task {task.id!r}"] = [call.tool for call in calls if call.tool != self._finish_tool]
        for where, names in named.items():
            for name in names:
                if name and name not in known:
                    raise UserError(
                        f"suite 'mcp': {where}: the server has no tool {name!r}, only {', '.join(sorted(known))}"
                    )
        return server.name, known

    def reset(self, task: Task) -> Observation:
        if task.id not in self._tasks:
            raise UserError(f"suite 'mcp' has no task {task.id!r}")
        self._task = None
        wanted = self._tasks[task.id]
        if self._server is not None and self._reset_tool is None:
            self.close()
        server = self._connect()
        self._tools = self._choose(server.tools())
        for call in [*([Call(self._reset_tool, {})] if self._reset_tool else []), *wanted.setup]:
            if (result := self._ask(call)).failed:
                raise EnvironmentFailure(f"task {task.id!r}: {call.as_action()} to set it up failed: {result.text}")
        self._task = wanted
        return Observation(text="The tools are ready.", goal=f"{wanted.goal}\n\n{self._manual()}")

    def step(self, action: str) -> Step:
        if self._task is None:
            raise RuntimeError("the episode is over: call reset first")
        try:
            call = read_call(action, self._tools)
        except ValueError as error:
            text = f"That is no call: {error}. {_FORM}"
            return Step(observation=Observation(text=text), reward=0.0, terminated=False, understood=False)
        finishes = call.tool == self._finish_tool
        if finishes and self._tools[call.tool]["added"]:
            text, failed = "You said that you are done.", False
        else:
            result = self._ask(call)
            text, failed = ("Error: " if result.failed else "") + self._cut(result.text), result.failed
        success = False
        if finishes or self._finish_tool is None:
            judged = self._ask(self._task.check.call)
            success = not judged.failed and self._task.check.passes(value=judged.value, text=judged.text)
        over = success or finishes
        if over:
            self._task = None
        return Step(
            observation=Observation(text=text),
            reward=float(success),
            terminated=over,
            success=success,
            score=float(success),
            understood=not failed,
        )

    def demonstration(self, task: Task) -> list[str] | None:
        calls = self._tasks[task.id].demonstration if task.id in self._tasks else None
        return None if calls is None else [call.as_action() for call in calls]

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server, self._task = None, None

    def _connect(self) -> ToolServer:
        if self._server is None:
            self._server = ToolServer(**self._how)
        return self._server

    def _ask(self, call: Call) -> Result:
        try:
            return self._connect().call(call.tool, call.arguments)
        except EnvironmentFailure:
            self.close()
            raise

    def _choose(self, known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The tools that the agent may call."""
        names = [name for name in known if name != self._reset_tool] if self._offered is None else self._offered
        chosen = {name: {**known[name], "added": False} for name in names if name in known}
        if self._finish_tool is not None and self._finish_tool not in chosen:
            is_new = self._finish_tool not in known
            entry = {"description": "Say that you are done.", "schema": {}} if is_new else known[self._finish_tool]
            chosen[self._finish_tool] = {**entry, "added": is_new}
        return chosen

    def _manual(self) -> str:
        lines = [
            f"{name}: {' '.join(tool['description'].split())} {json.dumps(_plain(tool['schema']))}"
            for name, tool in self._tools.items()
        ]
        return "\n".join(["Tools, each with the JSON schema of its arguments:", *lines, _FORM])

    def _cut(self, text: str) -> str:
        left = len(text) - self._longest
        return text if left <= 0 else f"{text[: self._longest]}\n[{left} more characters are not shown]"


def read_call(action: str, tools: Mapping[str, Any]) -> Call:
    """The call that an agent wrote.

    Raises:
        ValueError: it is none, in words for the agent.
    """
    try:
        said = json.loads(action, parse_constant=_refuse_constant)
        json.dumps(said, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(said, dict):
        raise ValueError("it is not a JSON object")
    found = cast("dict[str, Any]", said)
    if unknown := sorted(set(found) - {"tool", "arguments"}):
        raise ValueError(f"it has the key {unknown[0][:40]!r}; there are tool and arguments")
    name, arguments = found.get("tool"), found.get("arguments", {})
    if not isinstance(name, str) or name not in tools:
        raise ValueError(f"there is no tool {str(name)[:40]!r}, only {', '.join(tools)}")
    if not isinstance(arguments, dict):
        raise ValueError("its arguments are not a JSON object")
    return Call(name, cast("dict[str, Any]", arguments))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _plain(schema: Any) -> Any:
    """A schema without the titles that say a name again."""
    if isinstance(schema, list):
        return [_plain(entry) for entry in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _plain(inner) for name, inner in cast("dict[str, Any]", value).items()}
        if key == "properties" and isinstance(value, dict)
        else _plain(value)
        for key, value in cast("dict[str, Any]", schema).items()
        if key != "title"
    }
