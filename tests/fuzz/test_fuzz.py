"""A few hundred hostile cases at everything that reads what others wrote; `make fuzz` throws many more."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import yaml
from fuzz_guard import contained
from fuzz_targets import TARGETS, throw_case
from hypothesis import given, settings
from hypothesis import strategies as st

from epo.bounded_yaml import load_yaml


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_is_accepted_or_refused_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("CRITICAL")  # lost workers are told of, thousands of times
    target = TARGETS[name]
    with target.open(tmp_path) as throw:
        verdicts = Counter(
            throw_case(target, throw, random.Random(f"{name}/test/{number}"), tmp_path)
            for number in range(target.bounded)
        )
    assert sum(verdicts.values()) == target.bounded and verdicts["refused"] > 0
    assert not list(tmp_path.rglob("PWNED"))


def test_the_guard_sees_what_must_not_happen(tmp_path: Path) -> None:
    import os
    import pickle
    import socket
    import subprocess
    import sys
    import time

    from fuzz_guard import Hang

    def connect() -> None:
        with socket.socket() as client:
            client.connect_ex(("127.0.0.1", 9))

    for forbidden in (
        lambda: os.system("true"),
        lambda: subprocess.run([sys.executable, "-c", ""]),
        lambda: pickle.loads(pickle.dumps(os.system)),
        lambda: (tmp_path.parent / "elsewhere").write_text(""),
        connect,
    ):
        with pytest.raises(AssertionError, match="hostile input reached"), contained(folder=tmp_path, seconds=20):
            forbidden()
    with pytest.raises(Hang), contained(folder=tmp_path, seconds=0.05):
        time.sleep(5)
    with contained(folder=tmp_path, seconds=20):
        (tmp_path / "here").write_text("")


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(tree=plain)
def test_bounded_yaml_gives_back_plain_data(tree: object) -> None:
    """Against PyYAML itself: what it reads from its own writing, unless a text has a NUL in it."""
    text = yaml.safe_dump(tree)
    if r"\0" in text:
        return
    assert load_yaml(text) == yaml.safe_load(text) == tree


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60) | st.text(alphabet="[]{}:,-&*!|>'\"a1.\n ", max_size=60))
def test_bounded_yaml_answers_any_text_with_data_or_one_reason(text: str) -> None:
    try:
        load_yaml(text)
    except ValueError as error:
        assert type(error) is ValueError and len(str(error).splitlines()) <= 1
