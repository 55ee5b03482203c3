"""Arms, table, curves and figures of made-up runs, against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from epo.errors import UserError
from epo.evaluation.comparison import arm_name, compare, oscillation_of_entropy, window_mean
from epo.recipe import load_config


@dataclass
class Run:
    name: str
    config: dict[str, Any]
    steps: list[int] = field(default_factory=list[int])
    metrics: dict[str, list[float | None]] = field(default_factory=dict[str, "list[float | None]"])
    evaluations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    provenance: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def total_steps(self) -> int:
        return self.config["steps"]


def make_run(
    *overrides: str, seed: int = 0, success: dict[int, float] | None = None, name: str = "", ood: float = 0.25
) -> Run:
    """Ten steps; `success` on `iid` by step, and always `ood` on the other split."""
    config = load_config("base", ["steps=10", *overrides, f"seed={seed}"]).model_dump(mode="json")
    success = success or {0: 0.0, 5: 0.9, 10: 0.5}
    return Run(
        name=name or f"{'-'.join(overrides)}-{seed}",
        config=config,
        steps=list(range(1, 11)),
        metrics={
            "entropy/mean": [0.1 if step % 2 else 0.3 for step in range(10)],
            "turns/mean": [2.0] * 10,
            "episodes": [4.0] * 10,
            "tokens/sampled": [50.0] * 10,
            "reward/mean": [None, *[0.5] * 9],
            "success/train": [0.0] * 8 + [0.5, 1.0],
        },
        evaluations=[
            {"step": step, "panels": [{"split": "iid", "success": value}, {"split": "ood", "success": ood}]}
            for step, value in success.items()
        ],
    )


def row(page: dict[str, Any], arm: str, split: str = "iid") -> dict[str, Any]:
    [found] = [r for r in page["table"] if (r["arm"], r["split"]) == (arm, split)]
    return found


EPO, GRPO = "entropy.method=epo", ("algorithm.name=grpo", "rollout.group_size=4")


def test_an_arm_is_called_by_what_it_does() -> None:
    assert arm_name(load_config("base")) == "ppo"
    assert arm_name(load_config("base", [EPO])) == "ppo + epo"
    assert arm_name(load_config("base", [*GRPO, EPO]).model_dump(mode="json")) == "grpo + epo"


def test_the_window_holds_the_last_fifth_of_the_steps() -> None:
    run = make_run(success={0: 0.0, 5: 0.9, 8: 0.8, 9: 0.4, 10: 0.6})
    assert window_mean(run, "iid", window=0.2) == pytest.approx(0.5)  # steps 9 and 10
    assert window_mean(run, "iid", window=0.3) == pytest.approx(0.6)
    assert window_mean(run, "iid", window=0.01) == pytest.approx(0.6)  # the last step always
    assert window_mean(run, "none", window=0.2) is None


def test_the_table_by_hand() -> None:
    plain = [make_run(seed=s, success={0: 0.2, 5: 0.8, 10: v}) for s, v in enumerate((0.2, 0.4, 0.6))]
    treated = [make_run(EPO, seed=s, success={0: 0.2, 10: v}) for s, v in enumerate((0.6, 0.6, 0.9))]
    page = compare([*plain, *treated]).page()
    assert page == json.loads(json.dumps(page, allow_nan=False))
    assert page["baseline"] == "ppo"
    base, epo = row(page, "ppo"), row(page, "ppo + epo")
    assert base["window_mean"] == pytest.approx(0.4) and base["best_mean"] == pytest.approx(0.8)
    assert (base["relative"], base["improvement_probability"]) == (None, None)
    assert epo["window_mean"] == epo["best_mean"] == pytest.approx(0.7)
    assert epo["relative"] == pytest.approx(0.75)
    assert epo["improvement_probability"] == pytest.approx((7 + 2 * 0.5) / 9)  # two ties among nine pairs
    assert 0.2 <= base["low"] < 0.4 < base["high"] <= 0.6
    assert base["environment_steps"] == 80 and base["tokens"] == 500
    assert row(page, "ppo", "ood")["window_mean"] == 0.25
    training = row(page, "ppo", "training")
    assert (training["window_mean"], training["best_mean"], training["seeds"]) == (0.75, 1.0, 3)
    assert [arm["runs"] for arm in page["arms"]] == [[0, 1, 2], [3, 4, 5]]
    changes = np.diff([0.1 if step % 2 else 0.3 for step in range(10)])
    assert page["arms"][0]["entropy_oscillation"] == pytest.approx(np.std(changes))
    assert page["curves"]["eval/iid/success"]["ppo"]["mean"] == pytest.approx([0.2, 0.8, 0.4])
    reward = page["curves"]["reward/mean"]["ppo"]
    assert reward["steps"] == list(range(2, 11)) and reward["runs"] == [3] * 9


def test_every_algorithm_is_measured_against_its_own_baseline() -> None:
    runs = [
        make_run("rollout.tasks_per_step=32", success={10: 0.4}),
        make_run(*GRPO, "rollout.tasks_per_step=8", success={10: 0.8}),
        make_run("rollout.tasks_per_step=32", EPO, success={10: 0.6}),
        make_run(*GRPO, "rollout.tasks_per_step=8", EPO, success={10: 0.6}),
    ]
    page = compare(runs).page()
    assert row(page, "ppo + epo")["relative"] == pytest.approx(0.5)
    assert row(page, "grpo + epo")["relative"] == pytest.approx(-0.25)
    assert row(page, "grpo + epo")["baseline"] == "grpo"
    # One seed says nothing of the spread.
    assert row(page, "ppo")["low"] is row(page, "ppo + epo")["improvement_probability"] is None
    assert page["notes"] == []


@pytest.mark.parametrize("other", ["steps=5", "environment.options={length: 9}", "rollout.tasks_per_step=8"])
def test_nothing_is_divided_that_was_not_measured_alike(other: str) -> None:
    corridor = "environment.suite=corridor"
    page = compare([make_run(corridor), make_run(corridor, EPO, other, success={5: 0.6, 10: 0.6})]).page()
    assert row(page, "ppo + epo")["relative"] is None
    assert row(page, "ppo + epo")["improvement_probability"] is None
    assert any("budgets differ" in note for note in page["notes"]) == ("options" not in other)


def test_what_does_not_change_the_experiment_makes_no_arm() -> None:
    runs = [make_run(seed=0), make_run("environment.workers=3", "model.threads=1", "name=other", seed=1)]
    assert [arm["seeds"] for arm in compare(runs).page()["arms"]] == [[0, 1]]


def test_runs_of_other_environments_are_noted() -> None:
    def recorded(version: str | None, *overrides: str, seed: int) -> Run:
        run = make_run("environment.suite=scienceworld", *overrides, seed=seed, name=f"run{seed}")
        if version is not None:
            run.provenance = {"suite": {"name": "scienceworld", "scienceworld": version, "java": f"{seed}"}}
        return run

    alike = [recorded("1.2.2", seed=0), recorded("1.2.2", seed=1), recorded(None, seed=2)]
    assert compare(alike).page()["notes"] == []
    # Other options are other tasks, and known to be.
    others = "environment.options={simplification: none}"
    notes = compare([*alike, recorded("1.2.3", others, seed=3)]).page()["notes"]
    assert not [note for note in notes if "the same environment" in note]
    (note,) = compare([*alike, recorded("1.2.3", seed=3)]).page()["notes"]
    assert 'suite scienceworld: scienceworld ("1.2.2" in run0, run1, "1.2.3" in run3)' in note and "java" not in note


def test_arms_that_do_the_same_otherwise_are_told_apart() -> None:
    runs = [make_run(EPO, f"entropy.alpha={alpha}", "optimizer.learning_rate=1e-4") for alpha in (0.5, 2)]
    assert [arm.name for arm in compare(runs).arms] == [
        "ppo + epo (entropy.alpha=0.5)",
        "ppo + epo (entropy.alpha=2.0)",
    ]
    for run, arm in zip(runs, ("weak", "strong"), strict=True):
        run.name = f"{arm}--seed0"
    assert [arm.name for arm in compare(runs).arms] == ["ppo + epo (weak)", "ppo + epo (strong)"]


def test_runs_that_are_not_done_are_left_out_and_named() -> None:
    runs = [make_run(seed=0), make_run(seed=1, success={0: 0.1, 5: 1.0}, name="half")]
    page = compare(runs).page()
    assert row(page, "ppo")["seeds"] == 1 and row(page, "ppo")["window_mean"] == 0.5
    assert any("half" in note for note in page["notes"])
    assert page["curves"]["eval/iid/success"]["ppo"]["runs"] == [2, 2, 1]


def test_arms_with_different_seeds_are_pointed_out() -> None:
    runs = [make_run(seed=0), make_run(seed=1), make_run(EPO, seed=1)]
    [note] = compare(runs).page()["notes"]
    assert "seeds differ" in note and "ppo: 0, 1; ppo + epo: 1" in note
    assert compare([*runs, make_run(EPO, seed=0)]).page()["notes"] == []


def test_the_same_run_twice_counts_once() -> None:
    page = compare([make_run(seed=1), make_run(seed=1, success={10: 1.0}, name="again")]).page()
    assert row(page, "ppo")["seeds"] == 1 and row(page, "ppo")["window_mean"] == 0.5
    assert page["arms"][0]["runs"] == [0, 1] and page["curves"]["reward/mean"]["ppo"]["runs"] == [1] * 9
    assert any("again" in note for note in page["notes"])


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(UserError, match="no run"):
        compare([])


def test_the_papers_figures_are_those_that_have_their_arms() -> None:
    def figures(*arms: tuple[str, ...]) -> list[str]:
        return [f["id"] for f in compare([make_run(*arm) for arm in arms]).page()["figures"]]

    assert figures((EPO,)) == []
    assert figures((), (EPO,)) == ["figure-1", "figure-2"]
    assert figures(("environment.suite=household",), ("environment.suite=household", EPO)) == ["figure-1", "figure-5"]
    assert figures((EPO,), ("entropy.method=epo_base",)) == ["figure-3"]
    studied = figures((), (EPO,), ("entropy.method=epo_base",), ("entropy.method=ea",))
    assert studied == ["figure-1", "figure-2", "figure-3", "figure-4"]


def test_every_panel_of_a_figure_names_arms_that_there_are() -> None:
    page = compare([make_run(), make_run(EPO), make_run("entropy.method=ea"), make_run(*GRPO)]).page()
    names = {arm["name"] for arm in page["arms"]}
    panels = [panel for figure in page["figures"] for panel in figure["panels"]]
    assert panels and all(set(panel["arms"]) <= names and len(panel["arms"]) >= 2 for panel in panels)


def test_oscillation_is_of_changes_not_of_levels() -> None:
    run = make_run()
    run.metrics["entropy/mean"] = [0.1 * step for step in range(10)]  # steady growth does not oscillate
    assert oscillation_of_entropy(run) == pytest.approx(0.0)
    run.metrics["entropy/mean"] = [0.0, None, 1.0]
    run.steps = [1, 2, 3]
    assert oscillation_of_entropy(run) is None
