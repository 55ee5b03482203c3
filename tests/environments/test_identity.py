"""Records of suites: what counts as the same environment, and how one is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from epo.environments import make_suite
from epo.environments.identity import changed_facts, describe_suite_record, differing_facts, suite_facts

SCIENCEWORLD = {"name": "scienceworld", "scienceworld": "1.2.3", "jar_sha256": "ab" * 32, "java": 'openjdk "17.0.9"'}
HOUSEHOLD = {
    "name": "household",
    "note": "Generated games.",
    "options": {"counts": {"train": 4}, "task_types": ("look",)},
    "versions": {"alfworld": "0.4.2", "textworld": "1.6.2"},
    "games_sha256": "cd" * 32,
}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (
            HOUSEHOLD | {"versions": {"alfworld": "0.5.0", "textworld": "1.6.2"}},
            ["versions.alfworld", "0.4.2", "0.5.0"],
        ),
        (HOUSEHOLD | {"games_sha256": "ef" * 32}, ["games_sha256", "cd" * 32, "ef" * 32]),
        (HOUSEHOLD | {"options": {"counts": {"train": 5}}}, ["options.counts.train", "4 then", "5 now"]),
    ],
)
def test_a_change_is_named_with_both_values(now: dict[str, Any], said: list[str]) -> None:
    (change,) = changed_facts(HOUSEHOLD, now)
    assert all(part in change for part in said)
    (difference,) = differing_facts([("a", HOUSEHOLD), ("b", now), ("c", HOUSEHOLD)])
    assert said[0] in difference and "in a, c" in difference and "in b" in difference


def test_what_does_not_change_the_episodes_is_no_change() -> None:
    read = json.loads(json.dumps(HOUSEHOLD))  # a tuple comes back as a list
    for now in (read, read | {"note": "Other words."}, read | {"engine": "3"}, {"name": "household"}):
        assert changed_facts(HOUSEHOLD, now) == changed_facts(now, HOUSEHOLD) == []
        assert differing_facts([("a", HOUSEHOLD), ("b", now)]) == []
    assert changed_facts(SCIENCEWORLD, SCIENCEWORLD | {"java": 'openjdk "21"', "jar_sha256": None}) == []
    assert changed_facts({"url": "http://a:1", "version": "2"}, {"url": "http://b:1", "version": "2"}) == []
    deep: Any = "end"
    for _ in range(5000):
        deep = {"a": deep}
    assert all(suite_facts(strange) == {} for strange in (None, [], "text", deep))


def test_an_environment_is_one_line() -> None:
    assert describe_suite_record(SCIENCEWORLD) == "scienceworld (scienceworld 1.2.3, jar_sha256 abababababab)"
    assert describe_suite_record(HOUSEHOLD) == (
        "household (games_sha256 cdcdcdcdcdcd, alfworld 0.4.2, textworld 1.6.2)"
    )
    assert describe_suite_record({"name": "corridor", "length": 3}) == "corridor"


def test_the_same_suite_made_twice_is_the_same_environment() -> None:
    one, other = (make_suite("corridor", {"length": length}).provenance() for length in (5, 6))
    assert changed_facts(one, make_suite("corridor", {"length": 5}).provenance()) == []
    assert len(changed_facts(one, other)) == 2  # length and ood_length
