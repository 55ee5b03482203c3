"""`epo env check` passes what keeps the contract, and every one of its checks can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from epo import cli
from epo.authoring.checks import CHECKS, Finding, Thoroughness, Verdict, examine_suite
from epo.environments import register_suite
from epo.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "environments"))
register_suite("broken", "broken_suites:BrokenSuite")

BRIEF = Thoroughness(tasks=1, turns=6, resets=16, seconds=30)

FAULTS = {
    "constructor raises": ("suite", "ValueError: no land"),
    "no train": ("splits", "no split 'train'"),
    "empty split": ("splits", "'ood' is empty"),
    "any split": ("splits", "unknown split"),
    "shared": ("splits", "is in 'train' and in 'iid'"),
    "twice": ("splits", "is in 'train' and in 'train'"),
    "wrong split": ("splits", "says split 'train'"),
    "wrong suite": ("splits", "says suite 'other'"),
    "task order": ("plain data", "lists other tasks"),
    "id type": ("plain data", "goal is a NoneType"),
    "make_env raises": ("types", "make_env: ValueError: no walls"),
    "surrogates": ("types", "lone surrogates"),
    "no words": ("types", "neither text nor goal"),
    "reset returns text": ("types", "a str, not an Observation"),
    "score": ("types", "score is 2.0"),
    "reward": ("types", "reward is nan"),
    "success": ("types", "success without terminated"),
    "understood": ("types", "understood is a int"),
    "goal": ("types", "repeats the goal"),
    "counts resets": ("reset", "reset after one step: text"),
    "process id": ("determinism", "in another process, turn 0: text"),
    "empty": ("odd actions", "empty: step '': IndexError"),
    "surrogate": ("odd actions", "lone surrogates: "),
    "dies": ("odd actions", "control characters: step: the process died: exit code 3"),
    "goes on": ("after the end", "is answered"),
    "other error": ("after the end", "raises KeyError"),
    "gives up": ("demonstrations", "no success after 2 of 2"),
    "goes too far": ("demonstrations", "1 actions after the end"),
    "one string": ("demonstrations", "not a sequence of texts"),
    "memory": ("leaks", "memory grows"),
    "descriptors": ("leaks", "file descriptors are not closed"),
}


def failures(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.detail for finding in findings if finding.verdict is Verdict.FAILED}


@pytest.mark.parametrize(("fault", "expected"), FAULTS.items(), ids=FAULTS)
def test_a_broken_suite_fails_the_check_that_is_about_it(fault: str, expected: tuple[str, str]) -> None:
    found = failures(examine_suite("broken", {"fault": fault}, thoroughness=BRIEF))
    check, words = expected
    assert check in found
    assert words in found[check]
    assert "\n" not in found[check]


def test_a_hang_ends_at_the_deadline() -> None:
    brief = Thoroughness(tasks=1, turns=6, resets=2, seconds=5)
    found = failures(examine_suite("broken", {"fault": "hangs"}, thoroughness=brief))
    assert set(found) == {"odd actions"}
    assert "no answer within 5 s" in found["odd actions"]


def test_slower_than_the_limit_fails() -> None:
    limit = Thoroughness(tasks=1, turns=6, resets=2, slowest_ms=10)
    assert set(failures(examine_suite("broken", {"fault": "slow"}, thoroughness=limit))) == {"speed"}


def test_the_same_suite_without_a_fault_passes_every_check() -> None:
    findings = examine_suite("broken", {"fault": ""}, thoroughness=BRIEF)
    assert {finding.check: finding.verdict for finding in findings} == dict.fromkeys(CHECKS, Verdict.OK)


def test_train_is_enough() -> None:
    findings = examine_suite("broken", {"fault": "train alone"}, thoroughness=BRIEF)
    assert not failures(findings)
    assert "no iid and no ood" in findings[0].detail


def test_every_check_is_seen_to_fail_somewhere_here() -> None:
    assert set(CHECKS) <= {check for check, _ in FAULTS.values()} | {"speed"}


def test_an_unknown_suite_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="corridor"):
        examine_suite("coridor")


@pytest.mark.parametrize(("fault", "code"), [("", 0), ("score", 1)])
def test_the_command_says_by_its_exit_code_whether_all_is_right(
    fault: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["epo", "env", "check", "broken", f"fault={fault!r}", "--tasks", "1", "--resets", "16", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
        sys.exit(0)
    assert (ended.value.code or 0) == code
    found = {entry["check"]: entry["verdict"] for entry in json.loads(capsys.readouterr().out)}
    assert list(found) == list(CHECKS)
    assert (found["types"] == "failed") == bool(code)


def test_wrong_usage_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["epo", "env", "check", "corridor", "lenght=3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().count("\n") == 0
