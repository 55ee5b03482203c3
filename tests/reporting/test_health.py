"""Every alarm fires on a bad series, within steps of what went wrong, and no alarm does on good ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from made_up_runs import History, between, recorded, run, spoilt

from epo.config import Config, HealthConfig
from epo.errors import UserError
from epo.objectives.control import METHODS
from epo.recipe import load_config
from epo.reporting.health import ALARMS, RELEASE, Health, catalogue, judge
from epo.reporting.health.rules import SOLVED
from epo.reporting.metrics import rollout_metrics
from epo.types import StopReason, Task, Trajectory, TrajectoryGroup

NAMES = [
    *("entropy_eruption", "entropy_collapse", "entropy_oscillation", "cascade", "reward_variance", "gradient_spike"),
    *(
        "invalid_actions",
        "length",
        "repetition",
        "template_collapse",
        "sampler_mismatch",
        "equal_groups",
        "dead_critic",
        "environment_errors",
    ),
]
HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"

GOOD: dict[str, Callable[[], History]] = {
    "recorded: quickstart, ScienceWorld, PPO with EPO": lambda: recorded("quickstart"),
    **{
        f"recorded: {path.stem}": lambda path=path: recorded(path.stem)
        for path in sorted((HERE / "series").glob("good-*.jsonl"))
    },
    "like the quickstart": lambda: run(seed=0),
    "like it, 16 episodes a step": lambda: run(seed=1, episodes=16),
    "groups of 4": lambda: run(seed=2, group_size=4),
    "ends solved": lambda: run(seed=3, shapes={"success/train": between(0.5, 1.0, rate=6)}),
    "begins near nothing": lambda: run(seed=4, steps=120, shapes={"success/train": between(0.1, 0.7, rate=2)}),
    "a pretrained model: long responses, entropy 1.2 to 0.3": lambda: run(
        seed=5,
        shapes={
            "entropy/mean": between(1.2, 0.3),
            "entropy/turn_early": between(1.1, 0.3),
            "entropy/turn_late": between(1.3, 0.35),
            "response/tokens": between(180, 240, rate=1),
        },
    ),
    "entropy falls, then recovers slowly": lambda: run(
        seed=6, shapes={"entropy/mean": lambda x: 0.3 + 0.12 * math.cos(2 * math.pi * x)}
    ),
    "responses grow by half over the run": lambda: run(seed=7, shapes={"response/tokens": lambda x: 100 * (1 + x / 2)}),
    "500 steps": lambda: run(seed=8, steps=500),
}


@pytest.mark.parametrize("name", GOOD)
def test_no_alarm_on_a_good_run(name: str):
    assert [note for verdict in judge(GOOD[name]()) for note in verdict.notes()] == []


def test_there_are_ten_good_runs_at_least():
    assert len(GOOD) >= 10


def test_false_alarms_are_rare():
    """Made-up runs of 70 steps, 48 and 16 episodes a step, alone and in groups: one alarm in all is let pass.

    docs/health.md has the counts of many more.
    """
    counts = dict.fromkeys(NAMES, 0)
    for seed in range(16):
        history = run(seed=1000 + seed, episodes=(48, 16)[seed % 2], group_size=(1, 4)[seed // 2 % 2])
        for verdict in judge(history):
            for name in verdict.began:
                counts[name] += 1
    assert sum(counts.values()) <= 1, counts


START = 40
BAD: dict[str, tuple[int, Callable[[int, dict[str, float]], Mapping[str, float]]]] = {
    # alarm: steps until it must be on, and what goes wrong
    "entropy_eruption": (2, lambda i, m: {"entropy/mean": m["entropy/mean"] * (1 + i)}),
    "entropy_collapse": (5, lambda i, m: {"entropy/mean": 0.02, "success/train": 0.4}),
    "entropy_oscillation": (6, lambda i, m: {"entropy/mean": m["entropy/mean"] + (0.5 if i % 2 else 0.0)}),
    "cascade": (4, lambda i, m: {"entropy/turn_late": m["entropy/turn_late"] + 0.15 * (1 + i)}),
    "reward_variance": (4, lambda i, m: {"reward/std": 0.05, "success/train": 0.02}),
    "gradient_spike": (0, lambda i, m: {"policy/grad_norm": 9.0} if i == 0 else {}),
    "invalid_actions": (2, lambda i, m: {"turns/invalid": min(1.0, 0.1 + 0.1 * i)}),
    "length": (3, lambda i, m: {"response/tokens": m["response/tokens"] * 1.3 ** (1 + i)}),
    "repetition": (2, lambda i, m: {"response/repetition": min(1.0, 0.1 + 0.1 * i)}),
    "template_collapse": (7, lambda i, m: {"input/mutual_information": 0.05, "success/train": 0.6}),
    "sampler_mismatch": (0, lambda i, m: {"sampler/mismatch_kl": 0.05}),
    "equal_groups": (5, lambda i, m: {"groups/all_equal": 0.95, "success/train": 0.5}),
    "dead_critic": (10, lambda i, m: {"value/explained_variance": -0.001}),
    "environment_errors": (0, lambda i, m: {"stop/environment_error": 0.125}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_an_alarm_fires_when_its_thing_goes_wrong(name: str, seed: int):
    delay, change = BAD[name]
    history = spoilt(run(seed=100 + seed, group_size=4 if name == "equal_groups" else 1), START, change)
    assert START <= next(v.step for v in judge(history) if name in v.began) <= START + delay


def test_slow_changes_are_seen_where_they_are_meant():
    slow = run(seed=0, steps=200, shapes={"entropy/mean": lambda x: 0.25 + 1.0 * x})
    assert "entropy_eruption" in {n for v in judge(slow) for n in v.began}
    fading = run(seed=0, steps=200, shapes={"success/train": lambda x: 0.5 * (1 - x) ** 3})
    assert {n for v in judge(fading) for n in v.began} == {"reward_variance"}


BAD_ON_RECORD: dict[str, dict[str, int]] = {
    # run: the first step of every alarm that was on
    # SmolLM2-135M on ScienceWorld, 16 episodes a step: entropy 0.06 at first, 0.75 at step 12, then in cycles.
    "smollm2-scienceworld": {"entropy_eruption": 7, "entropy_oscillation": 12, "invalid_actions": 12},
    # The tiny model on ScienceWorld, PPO without entropy control, 24 episodes a step: entropy 0.36 at step 3, 1.5 at
    # step 6; success halves, then recovers.
    "bad-scienceworld-ppo": {
        **{"entropy_eruption": 5, "entropy_oscillation": 5, "invalid_actions": 5},
        "cascade": 6,
    },
    # GRPO in the corridor with too high a learning rate: entropy 1.4 to 4.7 at once, then an agent that is stuck.
    "bad-corridor-grpo": {
        **{"entropy_eruption": 4, "invalid_actions": 4, "length": 5},
        **{"template_collapse": 12, "repetition": 14},
    },
    # PPO with EPO in a longer corridor after too short a warm start: never sees the goal, never minds the prompt.
    "bad-corridor-ppo-epo": {
        **{"entropy_eruption": 11, "invalid_actions": 11, "length": 11},
        **{"template_collapse": 11, "gradient_spike": 13},
    },
}


@pytest.mark.parametrize("name", BAD_ON_RECORD)
def test_bad_runs_on_record(name: str):
    began: dict[str, int] = {}
    for verdict in judge(recorded(name)):
        for alarm in verdict.began:
            began.setdefault(alarm, verdict.step)
    assert began == BAD_ON_RECORD[name]


@pytest.mark.parametrize("cut", [0, 1, 7, 12, 13, 20, 25])
def test_a_resumed_run_is_judged_as_if_it_had_never_stopped(cut: int):
    history = recorded("smollm2-scienceworld")
    whole = judge(history)
    resumed = Health(HealthConfig())
    for line in history[:cut]:  # as read back from metrics.jsonl, health/* and all
        resumed.observe(json.loads(json.dumps({**line, **whole[int(line["step"]) - 1].metrics()})))
    assert [resumed.observe(line) for line in history[cut:]] == whole[cut:]


def test_an_alarm_lasts_until_its_rule_rests_and_is_announced_once():
    history = spoilt(run(seed=0), START, lambda i, m: {"sampler/mismatch_kl": 0.05} if i in (0, 2, 3) else {})
    verdicts = judge(history)
    on = [v.step for v in verdicts if "sampler_mismatch" in v.active]
    assert on == list(range(START, START + 3 + RELEASE))
    notes = [(v.step, note) for v in verdicts for note in v.notes()]
    assert [step for step, _ in notes] == [START, START + 3 + RELEASE]
    assert "Sampler and learner disagree: sampler/mismatch_kl 0.05 is above 0.01. Try: " in notes[0][1]
    assert "over" in notes[1][1] and all("\n" not in note for _, note in notes)
    assert [v.metrics()["health/sampler_mismatch"] for v in verdicts[START - 2 : START]] == [0.0, 1.0]


def test_a_gradient_that_is_not_finite_is_a_spike():
    history = spoilt(run(seed=0), START, lambda i, m: {"policy/grad_norm": math.nan, "update/skipped": 1.0})
    assert judge(history)[START - 1].began == ("gradient_spike",)


def test_a_small_policy_norm_does_not_hide_what_the_critic_does():
    """The policy's norm jumps, below the least that is a spike; the critic's does, far above it."""

    def change(i: int, m: dict[str, float]) -> Mapping[str, float]:
        return {"policy/grad_norm": 0.3, "value/grad_norm": 500.0} if i == 0 else {}

    calm = [{**line, "policy/grad_norm": 0.05, "value/grad_norm": 2.0} for line in run(seed=0)]
    verdict = judge(spoilt(calm, START, change))[START - 1]
    assert verdict.active["gradient_spike"].metric == "value/grad_norm"


def test_a_step_that_the_environments_lost_is_no_change_of_the_policy():
    task = Task(suite="s", id="t", split="train")
    lost = Trajectory(task=task, turns=[], stop_reason=StopReason.ENVIRONMENT_ERROR)
    outage = rollout_metrics([TrajectoryGroup(task=task, trajectories=[lost] * 4)])
    history = run(seed=0)
    history[START : START + 6] = [outage] * 6
    assert {name for verdict in judge(history) for name in verdict.active} == {"environment_errors"}


def test_an_outage_is_an_alarm_from_its_first_step_on():
    """No earlier steps are needed, and a few lost episodes are none."""
    history = [{"stop/environment_error": share} for share in (1.0, 0.1, 0.0, 0.05, 0.11)]
    assert [verdict.began for verdict in judge(history)] == [
        ("environment_errors",),
        (),
        (),
        (),
        ("environment_errors",),
    ]
    strict = judge(history, HealthConfig(environment_errors=0.0))
    assert [bool(verdict.active) for verdict in strict] == [True] * 5


def test_nothing_is_judged_that_is_not_there():
    """Old records lack metrics; steps lost to the environment have none at all; numbers may be null."""
    for line in ({}, {"step": 1, "entropy/mean": None, "note": "text"}):
        verdicts = judge([line] * 30)  # pyright: ignore[reportArgumentType]
        assert all(v.active == {} and set(v.metrics()) == {f"health/{name}" for name in NAMES} for v in verdicts)
    gaps = [{} if i % 3 else line for i, line in enumerate(run(seed=0))]
    assert not any(v.active for v in judge(gaps))


def test_first_steps_do_not_cry_wolf():
    """Comparisons wait for `warmup` earlier steps; what needs none does not wait."""
    jump = [{"entropy/mean": h, "response/tokens": 10 * h} for h in (0.1, 0.1, 5.0)]
    assert not any(v.active for v in judge(jump))
    assert set(judge([{"entropy/mean": 0.1}, *jump])[-1].active) == {"entropy_eruption"}
    assert set(judge([{"sampler/mismatch_kl": 1.0}])[0].active) == {"sampler_mismatch"}


@pytest.mark.parametrize("name", ["entropy_collapse", "reward_variance", "template_collapse", "equal_groups"])
def test_a_solved_task_is_no_trouble(name: str):
    def change(i: int, m: dict[str, float]) -> Mapping[str, float]:
        return {**BAD[name][1](i, m), "success/train": SOLVED}

    assert not any(name in v.active for v in judge(spoilt(run(seed=0, group_size=4), START, change)))


MILDER = {
    **dict.fromkeys(("entropy_eruption", "cascade", "gradient_spike", "length", "entropy_oscillation"), 1e6),
    **dict.fromkeys(("invalid_actions", "repetition"), 1.0),
    **dict.fromkeys(("reward_variance", "template_collapse"), 0.0),
    "entropy_collapse": 0.0,
    "sampler_mismatch": 1.0,
    "equal_groups": 0.99,
    "dead_critic": -1.0,
    "environment_errors": 0.9,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_is_the_key_of_its_alarm(name: str):
    config = HealthConfig.model_validate({name: MILDER[name]})
    history = spoilt(run(seed=100, group_size=4 if name == "equal_groups" else 1), START, BAD[name][1])
    assert not any(name in v.active for v in judge(history, config))


def test_the_last_good_checkpoint_was_neither_played_badly_nor_made_badly():
    """A step plays with the weights before it: a bad step 40 speaks against the checkpoints of 39 and 40."""
    health = Health(HealthConfig())
    for line in spoilt(run(seed=0), START, lambda i, m: {"sampler/mismatch_kl": 0.05} if i < 2 else {}):
        health.observe(line)
    (firing,) = health.firings
    assert (firing.since, firing.until) == (START, START + 1)
    assert health.last_good([10, 38, 39, 40, 41]) == 38
    assert health.last_good([10, 38, 39, 40, 41, 42]) == 42
    assert health.last_good([39, 40]) is None and health.last_good([]) is None
    assert health.last_good([39, 40], alarms=["length"]) == 40


def test_a_streak_that_may_become_an_alarm_is_suspected():
    """An alarm of three bad steps in a row speaks against all of them, so the first two are suspected already."""
    health = Health(HealthConfig())
    for line in spoilt(run(seed=0), START, BAD["reward_variance"][1])[: START + 1]:
        health.observe(line)
    assert health.firings == []
    assert health.last_good(range(START + 2)) == START + 1
    assert health.last_good(range(START + 2), suspecting=True) == START - 2


def test_a_persistent_alarm_speaks_against_all_its_bad_steps():
    health = Health(HealthConfig())
    for line in spoilt(run(seed=0), START, BAD["reward_variance"][1])[: START + 4]:
        health.observe(line)
    assert [(f.alarm, f.since, f.until) for f in health.firings] == [("reward_variance", START, None)]
    assert health.last_good(range(START + 4)) == START - 2


def test_the_catalogue_is_complete():
    assert list(ALARMS) == NAMES == [entry["name"] for entry in catalogue()]
    assert json.loads(json.dumps(catalogue()))
    assert set(NAMES) < set(HealthConfig.model_fields)
    page = (DOCS / "health.md").read_text()
    metrics = (DOCS / "metrics.md").read_text()
    for alarm in ALARMS.values():
        assert all(getattr(alarm, part) for part in ("title", "definition", "threshold", "source", "advice", "needs"))
        assert alarm.definition in page and alarm.advice in page
        assert f"`{alarm.name}`" in page and f"`health.{alarm.name}`" in (DOCS / "configuration.md").read_text()
        for metric in alarm.needs:
            assert f"`{metric}`" in metrics


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("health.halt=[entropy_explosion]", ("entropy_explosion", "entropy_eruption", "dead_critic")),
        ("health.halt=[length]", ("checkpoint.keep",)),
        ("health.length=0.5", ("health.length", "0.5")),
    ],
)
def test_what_cannot_be_meant_is_refused(override: str, words: tuple[str, ...]):
    with pytest.raises(UserError) as caught:
        load_config("base", [override, "checkpoint.keep=1"])
    assert all(word in str(caught.value) for word in words)


def test_halting_alarms_are_taken_by_name():
    config: Config = load_config("base", ["health.halt=[entropy_eruption, length]"])
    assert config.health.halt == ["entropy_eruption", "length"]


def test_advice_names_methods_that_there_are():
    named = {found for alarm in ALARMS.values() for found in re.findall(r"entropy\.method=(\w+)", alarm.advice)}
    assert named and named <= METHODS.keys()
