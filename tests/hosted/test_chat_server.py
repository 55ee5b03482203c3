"""One conversation, one answer, whatever a server does: what is sent, what is tried again, what is said."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_stub import Answer, ChatStub, Cut, Raw, Silence, refuses, says
from epo.errors import UserError
from epo.hosted import chat_server
from epo.hosted.chat_server import RETRIES, ChatServer, PromptTooLong, Refused, Reply
from epo.types import TokenCounts

MESSAGES = [{"role": "user", "content": "Where are you? 👩‍🚀"}]
HELLO = says("hello", usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9})
Script = Callable[[dict[str, Any], int], Answer]


def client(url: str, **options: Any) -> ChatServer:
    return ChatServer(url, "some/model", **{"timeout_seconds": 20.0, "first_wait_seconds": 0.001, **options})


def ask(server: ChatServer, *, seed: int = 5) -> Reply:
    return server.ask(MESSAGES, temperature=0.5, max_tokens=9, seed=seed).result(timeout=60)


def outcome(script: Script, *, greeted: bool = False, **options: Any) -> tuple[Reply | Exception, ChatStub]:
    """What becomes of one question. `greeted`: after one that was answered."""

    def answer(body: dict[str, Any], number: int) -> Answer:
        if greeted:
            return HELLO if number == 0 else script(body, number - 1)
        return script(body, number)

    with ChatStub(answer) as stub, client(stub.url, **options) as server:
        if greeted:
            ask(server)
        try:
            return ask(server), stub
        except (UserError, Refused) as error:
            return error, stub


def test_what_is_sent_and_what_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", " sk-1 \n")
    reply, stub = outcome(lambda *_: HELLO, key_variable="MY_KEY", fields={"top_p": 0.9, "seed": None})
    assert reply == Reply(text="hello", finished=True, counts=TokenCounts(7, 2))
    assert stub.paths == ["/v1/chat/completions"]
    assert stub.bodies == [
        {"model": "some/model", "messages": MESSAGES, "temperature": 0.5, "max_tokens": 9, "top_p": 0.9}
    ]
    assert stub.headers[0]["authorization"] == "Bearer sk-1"
    _, stub = outcome(lambda *_: HELLO)
    assert stub.bodies[0]["seed"] == 5 and "authorization" not in stub.headers[0]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (says("a", finish="length"), Reply(text="a", finished=False, counts=None)),
        (says("a", finish="content_filter"), Reply(text="a", finished=False, counts=None)),
        (says("a", finish=None), Reply(text="a", finished=True, counts=None)),
        (says("a", finish="eos_token"), Reply(text="a", finished=True, counts=None)),
        (says(None), Reply(text="", finished=True, counts=None)),
        (says("a\ud800b"), Reply(text="a?b", finished=True, counts=None)),
        (says("a", usage={"prompt_tokens": -1, "completion_tokens": 2}), Reply(text="a", finished=True, counts=None)),
        (says("a", usage={"prompt_tokens": True, "completion_tokens": 2}), Reply(text="a", finished=True, counts=None)),
        (says("a", usage=[1, 2]), Reply(text="a", finished=True, counts=None)),
    ],
)
def test_answers_of_all_sorts(answer: Answer, expected: Reply):
    assert outcome(lambda *_: answer)[0] == expected


def test_compressed_answers():
    body = gzip.compress(json.dumps(HELLO).encode())
    reply, _ = outcome(lambda *_: Raw(200, body, {"Content-Encoding": "gzip"}))
    assert isinstance(reply, Reply) and reply.text == "hello"


PASSING: dict[str, Answer] = {
    "429": refuses(429, "slow down"),
    "500": refuses(500),
    "502, a page": Raw(502, b"<html>bad gateway</html>"),
    "503": refuses(503, headers={"Retry-After": "0"}),
    "connection reset": Cut(),
    "no answer": Silence(),
    "bad compression": Raw(200, b"not gzip", {"Content-Encoding": "gzip"}),
}
STRANGE: dict[str, Answer] = {
    "a page": Raw(200, b"<html>\nhello</html>"),
    "no choices": {"choices": []},
    "choices of another kind": {"choices": "ab"},
    "a list": Raw(200, b"[1]"),
    "content that is no text": says([{"type": "text"}]),  # type: ignore[arg-type]
    "bytes": Raw(200, bytes(range(256))),
    "nested": Raw(200, b"[" * 100_000),
    "empty": Raw(200, b""),
}


@pytest.mark.parametrize("fault", [*PASSING, *STRANGE])
def test_what_passes_is_tried_again(fault: str):
    script, is_silent = (PASSING | STRANGE)[fault], fault == "no answer"
    reply, stub = outcome(
        lambda _, number: script if number < 2 else HELLO,
        greeted=fault in STRANGE,
        timeout_seconds=1.0 if is_silent else 20.0,
    )
    assert isinstance(reply, Reply) and reply.text == "hello"
    sent, expected = len(stub.bodies), 4 if fault in STRANGE else 3
    assert sent == expected or (is_silent and sent > expected)  # on a busy machine an answer may be late, too
    assert stub.bodies[-1] == stub.bodies[-2]  # the same question, its seed too


@pytest.mark.parametrize("fault", ["429", "500", "connection reset"])
def test_what_does_not_pass_is_given_up(fault: str):
    lost, stub = outcome(lambda *_: PASSING[fault], greeted=True)
    assert type(lost) is Refused and f", {RETRIES + 1} times" in str(lost)
    assert len(stub.bodies) == RETRIES + 2
    never, stub = outcome(lambda *_: PASSING[fault])
    assert isinstance(never, UserError) and len(stub.bodies) == RETRIES + 1


@pytest.mark.parametrize("fault", STRANGE)
def test_a_server_of_another_kind_is_named_at_once(fault: str):
    error, stub = outcome(lambda *_: STRANGE[fault])
    assert isinstance(error, UserError) and len(stub.bodies) == 1
    assert "no chat completion" in str(error) and "check --server" in str(error)


def test_nobody_there():
    with ChatStub(lambda *_: HELLO) as stub:
        pass
    start = time.monotonic()
    with client(stub.url, first_wait_seconds=60.0) as server, pytest.raises(UserError, match="cannot be reached"):
        ask(server)
    assert time.monotonic() - start < 50, "a wrong address is said without trying again"


def test_nobody_there_any_more():
    with ChatStub(lambda *_: HELLO) as stub, client(stub.url) as server:
        ask(server)
        stub.stop()
        with pytest.raises(UserError, match=f"(cannot be reached|broke off).*{RETRIES + 1} times"):
            ask(server)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form: str, monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []
    sleep = chat_server.asyncio.sleep

    async def note(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(chat_server.asyncio, "sleep", note)
    after = "30" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    busy = refuses(429, headers={"Retry-After": after})
    reply, _ = outcome(lambda _, number: busy if number < 2 else HELLO)
    assert isinstance(reply, Reply)
    assert len(waited) == 2 and all(20 < seconds <= 30 for seconds in waited)


def test_too_long_a_pause_ends_it():
    error, stub = outcome(lambda *_: refuses(429, headers={"Retry-After": "86400"}), greeted=True)
    assert isinstance(error, UserError) and "asks to wait 86400 s" in str(error) and len(stub.bodies) == 2


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []
    sleep = chat_server.asyncio.sleep

    async def note(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(chat_server.asyncio, "sleep", note)
    outcome(lambda *_: refuses(500), first_wait_seconds=1.0)
    assert len(waited) == RETRIES
    for attempt, seconds in enumerate(waited):
        assert 2**attempt / 2 <= seconds <= 2**attempt


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (refuses(401, "Incorrect API key provided: sk-secret-1"), "--api-key-env VARIABLE names a key"),
        (refuses(403), "answers 403"),
        (refuses(404, "The model `x` does not exist"), "The model `x` does not exist"),
        (Raw(404, b"<html>nothing here</html>"), "check --server"),
        (Raw(301, b"", {"Location": "http://192.0.2.1/v1/chat/completions"}), "a redirect, which is not followed"),
        (refuses(429, code="insufficient_quota"), "no quota left"),
        (refuses(400, "Unsupported parameter: 'max_tokens'"), "--request FIELD=null omits it"),
        (Raw(422, b'{"detail": [{"loc": ["body", "seed"]}]}'), "seed"),
    ],
)
def test_what_would_fail_at_every_request_is_said_at_once(answer: Answer, expected: str):
    error, stub = outcome(lambda *_: answer)
    assert isinstance(error, UserError) and expected in str(error) and len(stub.bodies) == 1
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("status", [401, 404])
def test_a_key_that_runs_out_and_a_model_that_goes_end_it(status: int):
    assert isinstance(outcome(lambda *_: refuses(status), greeted=True)[0], UserError)


def test_a_request_that_the_server_minds_is_its_own_matter():
    lost, stub = outcome(lambda *_: refuses(400, "we do not talk about this"), greeted=True)
    assert type(lost) is Refused and "we do not talk about this" in str(lost) and len(stub.bodies) == 2


@pytest.mark.parametrize(
    "answer",
    [
        refuses(400, "too many tokens", code="context_length_exceeded"),
        refuses(400, "This model's maximum context length is 2048 tokens. However, you requested 2100 tokens"),
        refuses(400, "the request exceeds the available context size, try increasing it", type="exceed_context_size"),
    ],
)
def test_conversations_that_are_too_long(answer: Answer):
    for greeted in (False, True):
        assert type(outcome(lambda *_: answer, greeted=greeted)[0]) is PromptTooLong


def test_the_key_is_never_repeated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    for status in (400, 401, 403, 404, 429, 500):
        for greeted in (False, True):
            error, _ = outcome(
                lambda *_, s=status: refuses(s, "bad key sk-secret-1"), greeted=greeted, key_variable="MY_KEY"
            )
            assert isinstance(error, Exception) and "sk-secret" not in str(error)
    for before in range(85, 100, 3):  # where the quotation ends, too
        error, _ = outcome(lambda *_, n=before: Raw(200, b"x" * n + b"sk-secret-1"), key_variable="MY_KEY")
        assert "no chat completion" in str(error) and "sk-" not in str(error)


@pytest.mark.parametrize("key", [None, "", "  ", "a\nb", "schlüssel"])
def test_keys_that_cannot_be_any(key: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match=r"--api-key-env MY_KEY.*\$MY_KEY") as refusal:
        client("http://127.0.0.1:1/v1", key_variable="MY_KEY")
    assert key is None or not key.strip() or key not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://a/v1",
        "http://",
        "http://a:b/v1",
        "http://a:99999/",
        "http://a/v1?x=1",
        "http://a b/",
    ],
)
def test_addresses_that_are_none(url: str):
    with pytest.raises(UserError, match="is no address of a server"):
        client(url)


def test_passwords_in_addresses_would_be_written_down():
    with pytest.raises(UserError, match="--api-key-env") as refusal:
        client("http://me:hunter2@a/v1")
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions", "/chat/completions/"])
def test_addresses_as_people_copy_them(ending: str):
    with ChatStub(lambda *_: HELLO) as stub, client(stub.url + ending) as server:
        ask(server)
    assert stub.paths == ["/v1/chat/completions"]


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(outcome(lambda *_: HELLO)[0], Reply)


def test_an_answer_without_an_end_is_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_server, "_MAX_BYTES", 1000)
    lost, _ = outcome(lambda *_: says("x" * 2000), greeted=True)
    assert type(lost) is Refused and "answers with more than" in str(lost)


def test_leaving_gives_up_what_is_not_answered():
    with ChatStub(lambda *_: Silence()) as stub:
        start = time.monotonic()
        with client(stub.url, timeout_seconds=60.0) as server:
            futures = [server.ask(MESSAGES, temperature=0.0, max_tokens=1, seed=0) for _ in range(3)]
            while len(stub.bodies) < 3:
                time.sleep(0.01)
        assert all(future.cancelled() for future in futures)
        assert time.monotonic() - start < 50
        assert not any(thread.name == "chat-server" for thread in threading.enumerate())


def test_whatever_the_texts_are_they_arrive_as_they_are():
    def echo(body: dict[str, Any], number: int) -> Answer:
        del number
        return says("|".join(message["content"] for message in body["messages"]))

    with ChatStub(echo) as stub, client(stub.url) as server:

        @given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=4))
        @settings(max_examples=25, deadline=None)
        def check(texts: list[str]) -> None:
            messages = [{"role": "user", "content": text} for text in texts]
            reply = server.ask(messages, temperature=1.0, max_tokens=3, seed=0).result(timeout=60)
            assert reply.text == "|".join(texts).encode("utf-8", "replace").decode()

        check()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["choices", "message", "content", "finish_reason", "usage", "prompt_tokens",
                                       "completion_tokens", "error", "code", "type", "detail"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(
    status=st.sampled_from([200, 200, 204, 302, 400, 401, 404, 418, 429, 503]),
    answer=plain.map(lambda tree: json.dumps(tree).encode()) | st.binary(max_size=30),
    after=st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12) | st.just("-1"),
    greeted=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_no_answer_is_a_surprise(status: int, answer: bytes, after: str, greeted: bool):
    server = client("http://127.0.0.1:1/v1")
    server._has_answered = greeted
    try:
        reply = server._judge(status, httpx2.Headers({"Retry-After": after}), answer)
    except (UserError, Refused) as error:
        assert len(str(error).splitlines()) == 1
    except chat_server._Passing as passing:
        assert 0 <= passing.after < float("inf")
    else:
        assert status == 200 and isinstance(reply.text, str)
        assert reply.counts is None or min(reply.counts) >= 0
