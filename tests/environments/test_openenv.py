"""Episodes on an OpenEnv server: a real one where it is installed (`make test-adapters`), and one that misbehaves."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from itertools import count
from typing import Any

import pytest
import servers

from epo.authoring.checks import Thoroughness, Verdict, examine_suite
from epo.environments import make_suite
from epo.errors import EnvironmentFailure, UserError

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("websockets"), reason="needs the extra openenv")
real = pytest.mark.skipif(servers.openenv_python() is None, reason="make test-adapters has OpenEnv's server")


def observation(done: bool = False, reward: Any = None, **fields: Any) -> str:
    said = {"observation": fields or {"text": "hello"}, "reward": reward, "done": done}
    return json.dumps({"type": "observation", "data": said})


def error(code: str, **more: Any) -> str:
    return json.dumps({"type": "error", "data": {"code": code, "message": f"about {code}", **more}})


HELLO = observation()


class Impostor:
    """A WebSocket server that speaks OpenEnv's protocol as far as the test lets it.

    Attributes:
        answers: to the messages of each connection, one after the other; None closes it, a function is called first.
        schema: what `/schema` says.
        elsewhere: where requests of a path are sent instead.
    """

    def __init__(self) -> None:
        from websockets.sync.server import serve

        self.answers: list[str | bytes | Callable[[], str] | None] = []
        self.schema: Any = {"action": {"properties": {"message": {"type": "string"}}, "required": ["message"]}}
        self.received: list[Any] = []
        self.elsewhere: dict[str, str] = {}
        self._server = serve(self._play, "127.0.0.1", 0, process_request=self._http, close_timeout=1)
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()

    def _http(self, connection: Any, request: Any) -> Any:
        if request.path in self.elsewhere:
            answer = connection.respond(HTTPStatus.TEMPORARY_REDIRECT, "")
            answer.headers["Location"] = self.elsewhere[request.path] + request.path
            return answer
        if request.path == "/ws":
            return None
        return connection.respond(HTTPStatus.OK, json.dumps(self.schema))

    def _play(self, connection: Any) -> None:
        answers = iter(list(self.answers))
        for message in connection:
            said = json.loads(message)
            self.received.append(said)
            if said["type"] == "close":
                return
            answer = next(answers)
            if answer is None:
                return
            connection.send(answer() if callable(answer) else answer)


@pytest.fixture
def impostor() -> Iterator[Impostor]:
    server = Impostor()
    yield server
    server.close()


def play(impostor: Impostor, *answers: Any, **options: Any) -> Any:
    """An environment after its reset."""
    impostor.answers = list(answers)
    suite = make_suite("openenv", {"url": impostor.url, "answer_seconds": 5.0, **options})
    env = suite.make_env()
    env.reset(suite.tasks("train")[0])
    return env


def test_what_goes_over_the_wire(impostor: Impostor) -> None:
    env = play(impostor, HELLO, observation(True, 1), action={"volume": 3}, options={"level": 2}, seed=5)
    step = env.step("say it")
    env.close()
    assert (step.success, step.terminated, step.reward) == (True, True, 1.0)
    assert impostor.received == [
        {"type": "reset", "data": {"level": 2, "seed": 5}},
        {"type": "step", "data": {"volume": 3, "message": "say it"}},
        {"type": "close"},
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no JSON",
        "[" * 100_000,
        "[]",
        "{}",
        '{"type": "observation", "data": []}',
        '{"type": "observation", "data": {"observation": "text", "reward": 0, "done": false}}',
        '{"type": "observation", "data": {"observation": {}, "reward": "much", "done": false}}',
        '{"type": "observation", "data": {"observation": {}, "reward": 0, "done": "no"}}',
        '{"type": "observation", "data": {"observation": {}, "reward": 1' + "0" * 400 + ', "done": true}}',
        '{"type": "state", "data": {}}',
        b"\xff\xfe\x00",
        error("EXECUTION_ERROR"),
        error("SESSION_ERROR"),
        '{"type": "error", "data": {}}',
        '{"type": "error", "data": "bad"}',
        "x" * (1 << 24 | 1),
        None,
    ],
)
def test_nonsense_is_an_environment_failure_and_the_next_episode_goes_on(impostor: Impostor, answer: Any) -> None:
    env = play(impostor, HELLO, answer)
    with pytest.raises(EnvironmentFailure, match=impostor.url):
        env.step("go")
    with pytest.raises(RuntimeError):
        env.step("go")
    task = make_suite("openenv", {"url": impostor.url}).tasks("train")[0]
    assert env.reset(task).text == "hello"
    env.close()


def test_a_late_answer_is_never_taken_for_the_next_one(impostor: Impostor) -> None:
    silence = threading.Event()

    def late() -> str:
        silence.wait(20)
        return observation(True, 1)

    env = play(impostor, HELLO, late, answer_seconds=1.0)
    with pytest.raises(EnvironmentFailure, match="gave no answer to step within 1 s"):
        env.step("go")
    silence.set()
    task = make_suite("openenv", {"url": impostor.url}).tasks("train")[0]
    assert env.reset(task).text == "hello"
    env.close()


def test_an_action_that_the_server_refuses_is_answered_in_words(impostor: Impostor) -> None:
    refusal = error("VALIDATION_ERROR", errors=[{"msg": "Input should be 'left' or 'right'", "loc": ["message"]}])
    env = play(impostor, HELLO, refusal, observation(True, 1))
    step = env.step("fly")
    assert step.observation.text == "That is no action here: Input should be 'left' or 'right'."
    assert (step.understood, step.terminated) == (False, False)
    assert env.step("left").success


FIELDS: list[tuple[dict[str, Any], str, Any, Any]] = [
    ({"type": "string"}, "7", "7", "x"),
    ({"type": "integer"}, " 7 ", 7, None),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "-3", -3, None),
    ({"type": "number"}, "0.5", 0.5, None),
    ({"type": "array"}, "[1, 2]", [1, 2], None),
    ({"$ref": "#/$defs/Way"}, "left", "left", "x"),
]


@pytest.mark.parametrize(("kind", "text", "sent", "of_x"), FIELDS)
def test_text_becomes_what_the_schema_asks_for(
    impostor: Impostor, kind: dict[str, Any], text: str, sent: Any, of_x: Any
) -> None:
    impostor.schema = {
        "action": {
            "properties": {"metadata": {"type": "object"}, "way": kind},
            "$defs": {"Way": {"type": "string", "enum": ["left", "right"]}},
        }
    }
    env = play(impostor, HELLO, HELLO, HELLO)
    assert env.step("x").understood is (of_x is not None)
    env.step(text)
    env.close()
    steps = [message["data"] for message in impostor.received if message["type"] == "step"]
    assert steps == [{"way": value} for value in (of_x, sent) if value is not None]


def test_choices_in_the_schema_are_the_admissible_actions(impostor: Impostor) -> None:
    impostor.schema = {"action": {"properties": {"way": {"type": "string", "enum": ["left", "right"]}}}}
    env = play(impostor, HELLO, observation(True, 0))
    assert env.step("left").observation.admissible_actions == ()
    suite = make_suite("openenv", {"url": impostor.url})
    assert env.reset(suite.tasks("train")[0]).admissible_actions == ("left", "right")
    env.close()


@pytest.mark.parametrize(
    "schema",
    [
        7,
        {"action": []},
        {"action": {"properties": {"way": 7}}},
        {"action": {"properties": {"way": {"enum": 7}}}},
        {"action": {"properties": {"way": {"anyOf": 7}}, "required": 7}},
        {"action": {"properties": {"way": {"$ref": [1]}}, "$defs": 7}},
    ],
)
def test_a_schema_that_is_none_is_no_crash(impostor: Impostor, schema: Any) -> None:
    impostor.schema = schema
    impostor.answers = [HELLO, HELLO]
    suite = make_suite("openenv", {"url": impostor.url, "action_field": "way"})
    suite.prepare()
    with suite.make_env() as env:
        env.reset(suite.tasks("train")[0])
        assert env.step("left").understood


@pytest.mark.parametrize("path", ["/schema", "/ws"])
def test_nobody_is_sent_to_another_host(impostor: Impostor, path: str) -> None:
    other = Impostor()
    other.answers, impostor.answers = [HELLO], [HELLO]
    impostor.elsewhere[path] = other.url.replace("127.0.0.1", "localhost")
    field = "message" if path == "/ws" else "text"
    suite = make_suite("openenv", {"url": impostor.url, "action_field": field})
    try:
        with suite.make_env() as env:
            if path == "/ws":
                with pytest.raises(EnvironmentFailure, match="no OpenEnv server answers"):
                    env.reset(suite.tasks("train")[0])
            else:  # the other's schema has no field "text"
                env.reset(suite.tasks("train")[0])
        assert other.received == []
    finally:
        other.close()


def test_an_agent_may_write_the_whole_action(impostor: Impostor) -> None:
    env = play(impostor, HELLO, HELLO, action_field="*")
    assert [env.step(text).understood for text in ("left", "[1]", '{"way": "left", "steps": 2}')] == [
        False,
        False,
        True,
    ]
    env.close()
    assert impostor.received[1]["data"] == {"way": "left", "steps": 2}


@pytest.mark.parametrize(
    ("fields", "options", "text"),
    [
        ({"text": "hi", "n": 1, "metadata": {"a": 1}}, {}, "hi"),
        ({"text": "hi", "more": "there"}, {}, "text: hi\nmore: there"),
        ({"board": [[0, 1]]}, {}, "board: [[0, 1]]"),
        ({"a": {"b": "deep"}, "c": 1}, {"observation": "{a.b}/{c}/{reward}/{not a field}"}, "deep/1/0.0/{not a field}"),
        ({"text": "{secret}\ud800", "secret": "x"}, {"observation": "{text}"}, "{secret}?"),
    ],
)
def test_what_the_agent_reads(impostor: Impostor, fields: dict[str, Any], options: dict[str, Any], text: str) -> None:
    env = play(impostor, HELLO, observation(**fields), observation(**fields), **{})
    env.close()
    impostor.answers = [observation(**fields)]
    suite = make_suite("openenv", {"url": impostor.url, **options})
    with suite.make_env() as env:
        assert env.reset(suite.tasks("train")[0]).text == text


@pytest.mark.parametrize(
    ("last", "options", "success"),
    [
        (observation(True, 1), {}, True),
        (observation(True, True), {}, True),
        (observation(True, 0.9), {}, False),
        (observation(False, 1), {}, False),
        (observation(True, 5), {"success_reward": 6}, False),
        (observation(True, 0, won=True), {"success_field": "won"}, True),
        (observation(True, 1, won=False), {"success_field": "won"}, False),
        (observation(True, 1, won="yes"), {"success_field": "won"}, False),
        (observation(True, 1, result={"won": True}), {"success_field": "result.won"}, True),
    ],
)
def test_what_counts_as_success(impostor: Impostor, last: str, options: dict[str, Any], success: bool) -> None:
    env = play(impostor, HELLO, last, **options)
    assert env.step("go").success is success
    env.close()


@pytest.mark.parametrize(
    ("options", "answers", "words"),
    [
        ({"observation": "{board}"}, [HELLO], "the observation has no field 'board'; there are reward, done, text"),
        ({"actions_field": "text"}, [HELLO], "'text' is hello, not a list"),
        ({"action_field": "text"}, [HELLO], "the action has no field 'text', only message"),
        ({}, [error("VALIDATION_ERROR")], "refuses a reset"),
        ({}, [error("FACTORY_ERROR")], "reports FACTORY_ERROR: about FACTORY_ERROR; start the server"),
        ({}, [observation(True)], "over before it begins"),
    ],
)
def test_mistakes_are_one_line(impostor: Impostor, options: dict[str, Any], answers: list[Any], words: str) -> None:
    impostor.answers = answers
    with pytest.raises(UserError, match=words):
        make_suite("openenv", {"url": impostor.url, **options}).prepare()


def test_an_action_of_several_fields_needs_a_name(impostor: Impostor) -> None:
    impostor.schema = {"action": {"properties": {"x": {}, "y": {}}, "required": ["x", "y"]}}
    with pytest.raises(UserError, match="'action_field' must say which of x, y"):
        play(impostor, HELLO)
    play(impostor, HELLO, action={"x": 1}).close()
    impostor.schema = "nothing"
    with pytest.raises(UserError, match="has no /schema"):
        play(impostor, HELLO).step("go")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "127.0.0.1:8000"}, "must be like http://"),
        ({"url": "file:///etc/passwd"}, "must be like http://"),
        ({"options": {"seed": 1}}, "'seed' is the suite's own"),
        ({"answer_seconds": 0}, "'answer_seconds' must be above 0"),
        ({"train": 0}, "'train' must be at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_suite("openenv", options)


def test_no_server_is_one_line_that_says_how_to_go_on() -> None:
    with pytest.raises(UserError, match=r"no OpenEnv server answers at http://127.0.0.1:9: .*; start the server"):
        make_suite("openenv", {"url": "http://127.0.0.1:9"}).prepare()


def test_the_check_says_where_a_seed_decides_nothing(impostor: Impostor) -> None:
    numbers = count()
    impostor.answers = [lambda: observation(text=f"episode {next(numbers)}")] * 50
    brief = Thoroughness(tasks=1, turns=2, resets=2)
    findings = {f.check: f for f in examine_suite("openenv", {"url": impostor.url}, thoroughness=brief)}
    assert findings["types"].verdict is Verdict.OK
    assert findings["determinism"].verdict is Verdict.FAILED
    assert "played again" in findings["determinism"].detail


@real
def test_a_real_server_plays_the_same_episode_for_the_same_seed() -> None:
    with servers.dial() as options:
        suite = make_suite("openenv", options)
        suite.prepare()
        assert suite.provenance()["environment"] == "Dial"
        task = suite.tasks("train")[0]
        with suite.make_env() as env, suite.make_env() as other:
            first = env.reset(task)
            assert (other.reset(task), env.reset(task)) == (first, first)
            assert first.admissible_actions == ("up", "down", "open")
            assert len({env.reset(task).goal for task in suite.tasks("train")}) > 1
            env.reset(task)
            assert env.step("x" * 41).observation.text.startswith("That is no action here: String should have at most")
            at, goal = (int(word.strip(".")) for word in first.text.split() if word.strip(".").isdigit())
            words = ["up" if goal > at else "down"] * abs(goal - at) + ["open"]
            assert [env.step(word).success for word in words] == [False] * (len(words) - 1) + [True]
            env.reset(task)
            with pytest.raises(EnvironmentFailure, match="EXECUTION_ERROR: the dial is broken"):
                env.step("smash")
            assert env.reset(task) == first


@real
def test_a_real_server_that_is_full_says_what_to_do() -> None:
    with servers.dial(sessions=1) as options:
        suite = make_suite("openenv", options)
        task = suite.tasks("train")[0]
        with suite.make_env() as env, suite.make_env() as other:
            for _ in range(3):  # a session that has ended is free at once
                env.reset(task)
                assert env.step("open").terminated
                other.reset(task)
                assert other.step("open").terminated
            env.reset(task)
            with pytest.raises(UserError, match="start the server with a larger max_concurrent_envs"):
                other.reset(task)
