"""Other libraries' environments keep the contract, say what the library says, and can be trained on.

reasoning-gym, TextArena and OpenEnv's server are tested where they are installed: `make test-adapters`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from rich.console import Console

from epo.authoring.checks import Thoroughness, Verdict, examine_suite
from epo.config import Config, ModelConfig
from epo.environments import make_suite
from epo.errors import UserError
from epo.recipe import parse_config
from epo.reporting.terminal.console import ConsoleObserver
from epo.training.policy import Policy
from epo.training.session import train_run
from epo.training.tiny import build_model

ECHO = {"id": "text_gym:Echo-v0", "train": 8, "iid": 4}
LINE = {"id": "text_gym:Line-v0", "actions": ["left", "right"], "ood_options": {"length": 5}}
GAMES = {"rooms": 2, "objects": 3, "quest_length": 2, "train": 1, "iid": 1, "ood": 1}
SUM = {"dataset": "chain_sum", "ood_options": {"min_terms": 8, "max_terms": 9}}
GUESS = {"id": "GuessTheNumber-v0", "options": {"max_number": 5, "max_turns": 4}, "ood_options": {"max_number": 9}}

gymnasium_installed = pytest.mark.skipif(not importlib.util.find_spec("gymnasium"), reason="needs the extra gymnasium")
reasoning_gym_installed = pytest.mark.skipif(
    not importlib.util.find_spec("reasoning_gym"), reason="make test-adapters has it"
)
openenv_installed = pytest.mark.skipif(servers.openenv_python() is None, reason="make test-adapters has it")
mcp_installed = pytest.mark.skipif(not importlib.util.find_spec("mcp"), reason="needs the extra mcp")
textarena_installed = pytest.mark.skipif(not importlib.util.find_spec("textarena"), reason="make test-adapters has it")
EVERY = [
    pytest.param("gymnasium", ECHO, marks=gymnasium_installed, id="gymnasium-text"),
    pytest.param("gymnasium", LINE, marks=gymnasium_installed, id="gymnasium-discrete"),
    pytest.param("textworld", GAMES, id="textworld"),
    pytest.param("reasoning_gym", SUM, marks=reasoning_gym_installed, id="reasoning_gym"),
    pytest.param("textarena", GUESS, marks=textarena_installed, id="textarena"),
    pytest.param("openenv", None, marks=openenv_installed, id="openenv"),
    pytest.param("mcp", None, marks=mcp_installed, id="mcp"),
]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def served(suite: str, options: dict[str, Any] | None, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The options of a suite, with a server at work where it needs one."""
    if suite == "openenv":
        with servers.dial() as found:
            yield found
    elif suite == "mcp":
        yield servers.drawers(tmp_path)
    else:
        assert options is not None
        yield options


@pytest.mark.parametrize(("suite", "options"), EVERY)
def test_an_adapter_keeps_the_contract(suite: str, served: dict[str, Any]) -> None:
    brief = Thoroughness(tasks=1, turns=6, resets=30)
    findings = examine_suite(suite, served, thoroughness=brief)
    assert not [finding for finding in findings if finding.verdict is Verdict.FAILED]


def minute(suite: str, options: dict[str, Any], *, model: Path) -> Config:
    return parse_config(
        {
            "name": suite,
            "steps": 2,
            "environment": {"suite": suite, "options": options, "workers": 2, "max_turns": 4},
            "agent": {"format": "action", "max_response_tokens": 6},
            "model": {"path": str(model), "max_context": 1024, "device": "cpu", "threads": 1},
            "imitation": {"demonstrations": 0},
            "rollout": {"tasks_per_step": 4},
            "entropy": {"method": "epo"},
            "optimizer": {"learning_rate": 0.001},
            "evaluation": {"every": 0, "episodes": 2, "splits": ["iid"]},
        }
    )


@pytest.mark.parametrize(("suite", "options"), EVERY)
def test_two_rl_steps_on_every_adapter(
    suite: str, served: dict[str, Any], tmp_path: Path, tiny_config: ModelConfig, tokenizer: Any
) -> None:
    # Where there is no expert, a run starts from a model.
    model = build_model(tokenizer, tiny_config.model_copy(update={"max_context": 1024}), seed=0)
    Policy(model, tokenizer, max_context=1024).save(tmp_path / "model")
    with ConsoleObserver(2, Console(quiet=True)) as observer:
        summary = train_run(minute(suite, served, model=tmp_path / "model"), tmp_path / "run", observer, resume=False)
    assert (summary["finished"], summary["steps"]) == (True, 2)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics.count("\n") == 2
    assert '"stop/environment_error": 0.0' in metrics


@gymnasium_installed
def test_gymnasium_success_is_a_last_reward_that_ends_the_episode() -> None:
    suite = make_suite("gymnasium", LINE)
    assert suite.splits == ("train", "iid", "ood")
    with suite.make_env() as env:
        env.reset(suite.tasks("train")[0])
        steps = [env.step(action) for action in ("right", " RIGHT ", "fly", "right")]
        assert [step.observation.text for step in steps] == [
            "place 1",
            "place 2",
            "Nothing happens.\nplace 2",
            "place 3",
        ]
        assert [step.understood for step in steps] == [True, True, False, True]
        assert [(step.success, step.terminated, step.reward) for step in steps[2:]] == [
            (False, False, 0),
            (True, True, 1),
        ]
        env.reset(suite.tasks("ood")[0])
        assert [env.step("right").success for _ in range(5)] == [False] * 4 + [True]
        env.reset(suite.tasks("train")[0])
        fallen = env.step("left")
        assert (fallen.terminated, fallen.success, fallen.reward) == (True, False, 0)


@gymnasium_installed
def test_gymnasium_limits_truncate_and_seeds_decide_the_task() -> None:
    suite = make_suite("gymnasium", ECHO)
    with suite.make_env() as env:
        texts = {env.reset(task).text for task in suite.tasks("train")}
        assert len(texts) > 1
        steps = [env.step("mauve") for _ in range(4)]
        assert [(step.terminated, step.truncated) for step in steps] == [(False, False)] * 3 + [(False, True)]


@gymnasium_installed
def test_gymnasium_renders_what_is_not_text() -> None:
    suite = make_suite(
        "gymnasium",
        {
            "id": "FrozenLake-v1",
            "options": {"is_slippery": False},
            "actions": ["left", "down", "right", "up"],
            "train": 1,
            "iid": 1,
        },
    )
    suite.prepare()
    with suite.make_env() as env:
        assert env.reset(suite.tasks("train")[0]).text.split() == ["[S]FFF", "FHFH", "FFFH", "HFFG"]
        steps = [env.step(action) for action in ["down", "down", "right", "right", "down", "right"]]
        assert "F[H]FH" not in steps[0].observation.text
        assert [step.success for step in steps] == [False] * 5 + [True]


@gymnasium_installed
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"id": "NoSuchGame-v0"}, "NoSuchGame"),
        ({"id": "text_gym:Line-v0"}, "must name the 2 actions"),
        ({"id": "text_gym:Line-v0", "actions": ["go", "go"]}, "each differently"),
        ({"id": "text_gym:Line-v0", "options": {"width": 3}}, "width"),
        ({"id": "Blackjack-v1", "actions": ["stick", "hit"]}, "no render mode 'ansi'"),
        ({"id": "text_gym:Echo-v0", "train": 0}, "'train' must be at least 1"),
    ],
)
def test_gymnasium_mistakes_are_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_suite("gymnasium", options).prepare()


def test_textworld_walkthroughs_win_and_the_interpreter_cannot_be_commanded() -> None:
    suite = make_suite("textworld", GAMES)
    task = suite.tasks("train")[0]
    with suite.make_env() as env:
        actions = env.demonstration(task)
        assert actions
        first = env.reset(task)
        assert first.goal and first.text.startswith("-= ")
        assert actions[0] in (first.admissible_actions or ())
        for command in (
            "quit",
            "restart",
            "Undo",
            "save",
            "look. restart",
            "tw-print states",
            "{x}",
            "y" * 300,
        ):
            step = env.step(command)
            assert (step.understood, step.terminated, step.score) == (False, False, 0.0), command
        assert not env.step("frobnicate the door").understood
        assert env.step("look").understood
        steps = [env.step(action) for action in actions]
        assert [step.success for step in steps] == [False] * (len(steps) - 1) + [True]
        assert (steps[-1].reward, steps[-1].score) == (1.0, 1.0)
        assert "RESTART" not in steps[-1].observation.text


def test_textworld_quests_have_the_length_asked_for() -> None:
    suite = make_suite("textworld", GAMES)
    with suite.make_env() as env:
        lengths = {split: len(env.demonstration(suite.tasks(split)[0]) or []) for split in suite.splits}
    assert lengths == {"train": 2, "iid": 2, "ood": 4}


def test_textworld_games_that_cannot_be_made_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quest_length"):
        make_suite("textworld", {**GAMES, "quest_length": 0})
    # The text of so long a quest is more than TextWorld's compiler takes.
    games = {**GAMES, "rooms": 1, "objects": 1, "quest_length": 100, "ood_quest_length": 1, "cache": str(tmp_path)}
    with pytest.raises(UserError, match="no such games can be made"):
        make_suite("textworld", games).prepare()
    assert not list((tmp_path / "textworld").iterdir())


@reasoning_gym_installed
def test_reasoning_gym_scores_as_the_library_does() -> None:
    import reasoning_gym

    suite = make_suite("reasoning_gym", {"dataset": "chain_sum", "train": 4, "iid": 4, "seed": 3})
    entry = reasoning_gym.create_dataset("chain_sum", seed=3, size=8)[5]
    task = suite.tasks("iid")[1]
    with suite.make_env() as env:
        assert env.reset(task).goal == entry["question"]
        right = env.step(entry["answer"])
        assert (right.success, right.terminated, right.score) == (True, True, 1.0)
        env.reset(task)
        wrong = env.step("no idea")
        assert (wrong.success, wrong.terminated, wrong.reward) == (False, True, 0.0)


@textarena_installed
def test_textarena_hints_lead_to_the_number() -> None:
    suite = make_suite("textarena", {"id": "GuessTheNumber-v0"})
    with suite.make_env() as env:
        observation = env.reset(suite.tasks("train")[0])
        assert "between 1 and 20" in (observation.goal or "")
        low, high = 1, 20
        while True:
            guess = (low + high) // 2
            step = env.step(str(guess))
            if step.terminated:
                break
            low, high = (guess + 1, high) if "higher" in step.observation.text else (low, guess - 1)
        assert (step.success, step.reward, step.score) == (True, 1.0, 1.0)
