"""Tools of a real MCP server: an agent's call reaches them as written, and nothing else does."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from hypothesis import given
from hypothesis import strategies as st

from epo.environments import TaskSuite, TextEnv, make_suite
from epo.environments.adapters.mcp import read_call
from epo.environments.pool import EnvPool
from epo.errors import EnvironmentFailure, UserError
from epo.types import Step

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("mcp"), reason="needs the extra mcp")

RIGHT = '{"tool": "put", "arguments": {"thing": "key", "drawer": "left"}}'


def opened(folder: Path, **options: Any) -> tuple[TaskSuite, TextEnv]:
    suite = make_suite("mcp", servers.drawers(folder, **options))
    return suite, suite.make_env()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TaskSuite, TextEnv]]:
    """One server for tests that leave it alive: starting one takes a second."""
    suite, env = opened(tmp_path_factory.mktemp("drawers"), tools=["put", "look", "where", "read_aloud"])
    with env:
        yield suite, env


def test_a_call_acts_on_the_server_and_the_check_decides(shared: tuple[TaskSuite, TextEnv]) -> None:
    suite, env = shared
    task = suite.tasks("train")[0]
    first = env.reset(task)
    assert (first.goal or "").startswith("Put the key into the left drawer.")
    assert 'put: Put a thing into a drawer, wherever it was before. {"type": "object"' in (first.goal or "")
    looked = env.step('{"tool": "look", "arguments": {"drawer": "top"}}')
    assert (looked.observation.text, looked.understood, looked.terminated) == ("key", True, False)
    wrong = env.step('{"tool": "put", "arguments": {"thing": "key", "drawer": "right"}}')
    assert (wrong.observation.text, wrong.success) == ("The key is in the right drawer.", False)
    done = env.step(RIGHT)
    assert (done.success, done.terminated, done.reward, done.score) == (True, True, 1.0, 1.0)
    with pytest.raises(RuntimeError):
        env.step(RIGHT)
    assert env.reset(task) == first


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("put the key", "it is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("7", "not a JSON object"),
        ('{"tool": "pid"}', "there is no tool 'pid', only put, look, where, read_aloud"),
        ('{"tool": "empty"}', "there is no tool 'empty'"),
        ('{"tool": "put", "args": {}}', "it has the key 'args'"),
        ('{"tool": "put", "arguments": "key"}', "arguments are not a JSON object"),
        ('{"tool": "put", "arguments": {"thing": NaN}}', "NaN is not JSON"),
        ('{"tool": "put", "arguments": {"thing": 1e999}}', "JSON compliant"),
        ('{"tool": "put", "arguments": {"thing": "\\ud800"}}', "half a character"),
        ('{"tool": "put", "arguments": {"thing": "key"}}', "Error: "),
        ('{"tool": "put", "arguments": {"thing": "key", "drawer": "; rm -rf /"}}', "there is no drawer ; rm -rf /"),
        ('{"tool": "where", "arguments": {"thing": "ghost"}}', "Error: "),
    ],
)
def test_a_bad_call_is_answered_in_words(action: str, words: str, shared: tuple[TaskSuite, TextEnv]) -> None:
    suite, env = shared
    env.reset(suite.tasks("train")[0])
    step = env.step(action)
    assert words in step.observation.text
    assert (step.understood, step.terminated, step.reward) == (False, False, 0.0)
    assert env.step(RIGHT).success


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@given(st.text() | st.builds(json.dumps, st.dictionaries(st.sampled_from(["tool", "arguments", "x"]), json_values)))
def test_whatever_is_written_is_a_call_or_a_reason(action: str) -> None:
    try:
        call = read_call(action, {"put": {}})
    except ValueError as error:
        assert str(error)
    else:
        assert call.tool == "put"
        assert json.loads(call.as_action()) == {"arguments": {}, **json.loads(action)}


def test_finishing_ends_the_episode_either_way(tmp_path: Path) -> None:
    suite, env = opened(tmp_path, finish_tool="finish")
    with env:
        for calls, success in [([], False), ([RIGHT], True)]:
            first = env.reset(suite.tasks("train")[0])
            assert "finish: Say that you are done." in (first.goal or "")
            assert not any(env.step(call).terminated for call in calls)
            last = env.step('{"tool": "finish"}')
            assert (last.terminated, last.success) == (True, success)


def test_results_are_cut(shared: tuple[TaskSuite, TextEnv]) -> None:
    suite, env = shared
    env.reset(suite.tasks("train")[0])
    texts = [
        env.step(f'{{"tool": "read_aloud", "arguments": {{"characters": {n}}}}}').observation.text for n in (4000, 4010)
    ]
    assert texts == ["x" * 4000, "x" * 4000 + "\n[10 more characters are not shown]"]


@pytest.mark.parametrize("reset_tool", [None, "empty"])
def test_a_reset_starts_a_server_anew_or_calls_its_tool(reset_tool: str | None, tmp_path: Path) -> None:
    suite, env = opened(tmp_path, reset_tool=reset_tool, tools=["pid", "put", "look"])
    seen: list[str] = []
    with env:
        for _ in range(2):
            env.reset(suite.tasks("train")[0])
            assert env.step('{"tool": "look", "arguments": {"drawer": "left"}}').observation.text == "[]"
            env.step('{"tool": "put", "arguments": {"thing": "hat", "drawer": "left"}}')
            seen.append(env.step('{"tool": "pid"}').observation.text)
    assert (seen[0] == seen[1]) is (reset_tool is not None)
    assert not any(Path(f"/proc/{pid}").exists() for pid in seen)


def test_a_server_that_dies_or_hangs_costs_its_episode_only(tmp_path: Path) -> None:
    suite, env = opened(tmp_path, tools=["die", "sleep", "put"], answer_seconds=8.0)
    task = suite.tasks("train")[0]
    with env:
        for call in ('{"tool": "die"}', '{"tool": "sleep"}'):
            env.reset(task)
            with pytest.raises(EnvironmentFailure, match="was lost at"):
                env.step(call)
        env.reset(task)
        assert env.step(RIGHT).success


def test_servers_end_with_the_worker_that_started_them(tmp_path: Path) -> None:
    # The SDK gives a server a session of its own, and this one does not end when its input does.
    options = servers.drawers(tmp_path, tools=["pid", "sleep"])
    with EnvPool("mcp", options, size=1, max_restarts=0, timeout_seconds=3.0, slow_timeout_seconds=60.0) as pool:
        suite = make_suite("mcp", options)
        pool.gather([pool.submit_reset(0, suite.tasks("train")[0])])
        told = pool.gather([pool.submit_step(0, '{"tool": "pid"}')])[0]
        assert isinstance(told, Step)
        pid = int(told.observation.text)
        assert Path(f"/proc/{pid}").exists()
        lost = pool.gather([pool.submit_step(0, '{"tool": "sleep"}')])[0]
        assert isinstance(lost, EnvironmentFailure)
        deadline = time.monotonic() + 10
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def test_streamable_http(tmp_path: Path) -> None:
    with servers.serving(sys.executable, str(servers.HERE / "mcp_drawers.py"), "http") as port:
        url = f"http://127.0.0.1:{port}/mcp"
        options = {**servers.drawers(tmp_path), "command": None, "url": url}
        suite = make_suite("mcp", options)
        suite.prepare()
        assert suite.provenance()["server"] == "drawers 1.0"
        with suite.make_env() as env:
            env.reset(suite.tasks("train")[0])
            assert env.step(RIGHT).success


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"command": None}, "needs one of the options 'command' and 'url'"),
        ({"command": []}, "must name a program"),
        ({"command": None, "url": "drawers"}, "must be like http"),
        ({"command": ["/no/such/program"]}, "no MCP server answers at '/no/such/program'"),
        ({"command": [sys.executable, "-c", "print('hello')"]}, "no MCP server answers"),
        ({"tools": ["fly"]}, "option 'tools': the server has no tool 'fly', only die, empty"),
        ({"max_result_characters": 0}, "'max_result_characters' must be above 0"),
        ({"tasks": "/no/such/file"}, "cannot read the tasks in '/no/such/file'"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        make_suite("mcp", servers.drawers(tmp_path, answer_seconds=10.0, **options)).prepare()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2: a task must be a JSON object"),
        ('{"goal": "g"}', "line 2: check must be a JSON object, not null"),
        ('{"goal": "", "check": {"tool": "is_in"}}', 'line 2: goal must be a text, not ""'),
        ('{"goal": "g", "check": {"tool": "is_in", "is": 1}}', "line 2: check has no key 'is'"),
        ('{"goal": "g", "check": {"tool": "is_in", "equals": 1, "contains": "1"}}', "exclude each other"),
        ('{"goal": "g", "check": {"tool": "is_in"}, "setup": [{"tool": 1}]}', r"setup\[0\].tool must be a text"),
        ('{"id": "1", "goal": "g", "check": {"tool": "is_in"}}', "line 2: the id 'train/1' is there twice"),
    ],
)
def test_a_line_that_is_no_task_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"goal": "g", "check": {"tool": "is_in"}}\n' + line)
    with pytest.raises(UserError, match=words):
        make_suite("mcp", {"tasks": str(path), "command": ["never started"]})


def test_a_task_may_name_only_tools_that_there_are(tmp_path: Path) -> None:
    options = servers.drawers(tmp_path)
    Path(options["tasks"]).write_text('{"goal": "g", "check": {"tool": "fly"}}')
    with pytest.raises(UserError, match="task 'train/1': the server has no tool 'fly'"):
        make_suite("mcp", options).prepare()


CHECKS: list[tuple[dict[str, Any], str, bool]] = [
    ({"tool": "is_in"}, "left", True),
    ({"tool": "is_in"}, "top", False),
    ({"tool": "is_in", "equals": False}, "top", True),
    ({"tool": "is_in", "equals": 1}, "left", False),
    ({"tool": "where", "equals": "left"}, "left", True),
    ({"tool": "where", "equals": "left"}, "top", False),
    ({"tool": "where", "contains": "ef"}, "left", True),
    ({"tool": "where", "contains": "ef"}, "top", False),
    ({"tool": "look", "equals": ["key"]}, "left", True),
    ({"tool": "look", "equals": ["key"]}, "top", False),
]


def test_what_a_check_asks(tmp_path: Path) -> None:
    asked = {"is_in": {"thing": "key", "drawer": "left"}, "where": {"thing": "key"}, "look": {"drawer": "left"}}
    options = servers.drawers(tmp_path)
    lines = [{"goal": "g", "check": {**check, "arguments": asked[check["tool"]]}} for check, _, _ in CHECKS]
    Path(options["tasks"]).write_text("\n".join(map(json.dumps, lines)))
    suite = make_suite("mcp", options)
    with suite.make_env() as env:
        for task, (check, place, passes) in zip(suite.tasks("train"), CHECKS, strict=True):
            env.reset(task)
            put = json.dumps({"tool": "put", "arguments": {"thing": "key", "drawer": place}})
            assert env.step(put).success is passes, (check, place)
