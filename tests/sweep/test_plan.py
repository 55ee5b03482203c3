"""What a sweep's file means, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from epo.errors import UserError
from epo.sweep.plan import load_sweep


def test_one_run_for_each_arm_and_seed_seed_by_seed() -> None:
    sweep = load_sweep(Path("two.yaml"))
    assert [run.name for run in sweep.runs()] == ["plain--seed0", "bonus--seed0", "plain--seed1", "bonus--seed1"]
    plain, bonus = sweep.configs["plain"], sweep.configs["bonus"]
    assert (plain.entropy.method, bonus.entropy.method) == ("none", "bonus")
    assert bonus.entropy.options()["coefficient"] == 0.01
    assert plain.model_copy(update={"entropy": bonus.entropy}) == bonus


def test_an_arm_changes_what_it_names_and_nothing_beside_it() -> None:
    Path("s.yaml").write_text(
        "recipe: minute.yaml\nseeds: [7]\nset: {optimizer.learning_rate: 1.0e-05, environment: {max_turns: 3}}\n"
        "arms:\n  a: {algorithm: {gamma: 0.5}}\n  b: {algorithm.gamma: 0.25, environment.options.length: 2}\n"
    )
    sweep = load_sweep(Path("s.yaml"))
    a, b = sweep.configs["a"], sweep.configs["b"]
    assert sweep.plan.name == "s"
    assert (a.algorithm.gamma, b.algorithm.gamma) == (0.5, 0.25)
    for config in (a, b):
        assert config.optimizer.learning_rate == 1e-5
        assert config.optimizer.minibatches == 2  # of the recipe, beside what the sweep sets
        assert config.environment.max_turns == 3
        assert config.seed == 7
    assert a.environment.options == {"length": 3, "choices": 2, "tasks": 4}
    assert b.environment.options == {"length": 2, "choices": 2, "tasks": 4}


@pytest.mark.parametrize(("set_", "threads"), [("{}", 1), ("{model.threads: 2}", 2), ("{model: {threads: 2}}", 2)])
def test_runs_have_one_thread_unless_the_sweep_says_otherwise(set_: str, threads: int) -> None:
    Path("s.yaml").write_text(f"recipe: minute.yaml\nseeds: [0]\nset: {set_}\narms: {{a: }}\n")
    assert load_sweep(Path("s.yaml")).configs["a"].model.threads == threads


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: minute.yaml\nseeds: [0]\n", "arms"),
        ("recipe: minute.yaml\nseeds: []\narms: {a: }\n", "seeds=[]"),
        ("recipe: minute.yaml\nseeds: [1, 1]\narms: {a: }\n", "names a seed twice"),
        ("recipe: minute.yaml\nseeds: [-1]\narms: {a: }\n", "seeds.0=-1"),
        ("recipe: minute.yaml\nseeds: [0]\narms: {../a: }\n", "'../a'"),
        ("recipe: minute.yaml\nseeds: [0]\narms: {config: }\n", "cannot be called 'config'"),
        ("recipe: minute.yaml\nseeds: [0]\narms: {a: }\nparallel: 2\n", "unknown key 'parallel'"),
        ("recipe: minute.yaml\nseeds: [0]\narms: {a: {seed: 3}}\n", "put it into seeds"),
        ("recipe: minute.yaml\nseeds: [0]\narms: {a: {entropy.methd: epo}}\n", "arm 'a'"),
        ("recipe: minutes.yaml\nseeds: [0]\narms: {a: }\n", "unknown recipe"),
        ("[1, 2]", "must be a mapping"),
        ("{a: ", "cannot be read as YAML"),
    ],
)
def test_a_mistake_is_named(text: str, said: str) -> None:
    Path("s.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_sweep(Path("s.yaml"))
    assert said in str(error.value) and "s.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_sweep(Path("none.yaml"))
