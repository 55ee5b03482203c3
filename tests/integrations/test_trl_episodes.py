"""TRL's environment mode with responses that are really sampled: turns, checkpoints, and the example."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from scripted import plain_options
from trl import GRPOTrainer

from epo.errors import UserError
from epo.integrations.trl import EPOConfig, EPOTrainer
from epo.integrations.trl.tokens import turn_ids, turn_metrics
from epo.training.policy import Policy

Make = Callable[..., EPOTrainer]


class House:
    """Observations of different lengths, so that episodes meet the limit of theirs after different numbers of turns."""

    def reset(self, **_: Any) -> str:
        self.actions: list[str] = []
        return "You see a door."

    def act(self, action: str) -> str:
        """Act.

        Args:
            action: what to do.
        """
        self.actions.append(action)
        return "You see a door. " * (1 + len(action) % 4)

    def get_reward(self) -> float:
        return sum(map(len, self.actions)) % 5


@pytest.fixture
def make(base_policy: Policy, tool_tokenizer: Any, tmp_path: Path) -> Make:
    def make(trainer: type[GRPOTrainer] = EPOTrainer, **options: Any) -> Any:
        config = EPOConfig(
            **{
                **plain_options(tmp_path / "run"),
                "num_generations": 4,
                "max_tool_calling_iterations": 4,
                "max_completion_length": 60,
                "generation_kwargs": {"max_new_tokens": 5},
                "epo_method": "epo_strong",
                "epo_coefficient": 0.05,
            }
            | options
        )
        return trainer(
            model=copy.deepcopy(base_policy.model),
            args=config,
            processing_class=copy.deepcopy(tool_tokenizer),
            train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * 64}),
            environment_factory=House,
        )

    return make


def test_turns_are_runs_of_trained_tokens() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0, 0, 0], [0] * 9, [1] * 9])
    assert turn_ids(mask).tolist() == [
        [0, 0, -1, 1, -1, -1, 2, 2, -1],
        [-1, 0, 0, 0, -1, -1, -1, -1, -1],
        [-1] * 9,
        [0] * 9,
    ]


def test_early_and_late_are_thirds_of_the_turns_played() -> None:
    """Seven turns: thirds of two. Two turns: thirds of one. One turn counts for the mean only."""
    entropies = {0: [[1.0], [2.0, 4.0], [9.0], [9.0], [9.0], [5.0], [6.0, 8.0]], 1: [[0.5], [2.5]], 2: [[7.0]]}
    flat = [(h, row, turn) for row, turns in entropies.items() for turn, hs in enumerate(turns) for h in hs]
    h, row, turn = (torch.tensor(part) for part in zip(*flat, strict=True))
    assert turn_metrics(h, row, turn) == pytest.approx(
        {
            "entropy/mean": statistics.fmean(entropy for entropy, _, _ in flat),
            "entropy/turn_early": ((1.0 + 3.0) / 2 + 0.5) / 2,
            "entropy/turn_late": ((5.0 + 7.0) / 2 + 2.5) / 2,
        }
    )
    assert turn_metrics(h[:0], row[:0], turn[:0]) == {}
    assert turn_metrics(h[-1:], row[-1:], turn[-1:]) == {"entropy/mean": 7.0}


def test_turns_and_weights_are_those_of_the_responses_that_were_drawn(make: Make) -> None:
    """What the model was asked to go on with tells what it said before: prompt, response, observation, response, .."""
    calls: list[tuple[list[list[int]], list[list[int]]]] = []
    batches: list[dict[str, Any]] = []

    class Watched(EPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            drawn = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            calls.append((copy.deepcopy(prompt_ids), copy.deepcopy(drawn[0])))
            return drawn

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batches.append(super()._generate_and_score_completions(inputs))
            return batches[-1]

    make(Watched).train()
    (batch,) = batches
    turns_played = set()
    for row in range(8):
        length = int(batch["completion_mask"][row].sum())
        ids = batch["completion_ids"][row, :length].tolist()
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        # Each response, placed right behind the text that it continues; cut where TRL cuts the episode.
        literal = [-1] * length
        turn = 0
        for read, drawn in calls:
            for context, response in zip(read, drawn, strict=True):
                start = len(context) - len(prompt)
                if (prompt + ids)[: len(context)] != context or not 0 <= start < length:
                    continue
                if ids[start : start + len(response)] != response[: length - start] or literal[start] >= 0:
                    continue
                literal[start : start + len(response)] = [turn] * min(len(response), length - start)
                turn += 1
        assert batch["turn_ids"][row, :length].tolist() == literal
        assert (batch["turn_ids"][row, length:] == -1).all()
        for played in range(turn):
            share = 1 / (8 * turn * literal.count(played))
            weights = batch["entropy_weights"][row, :length][torch.tensor(literal) == played]
            assert weights.tolist() == pytest.approx([share] * literal.count(played))
        assert (batch["entropy_weights"][row][batch["turn_ids"][row] < 0] == 0).all()
        turns_played.add(turn)
    assert len(turns_played) > 1 and max(turns_played) > 2


def test_two_steps_and_two_more_equal_four(make: Make, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole = make(**options)
    whole.train()
    halfway = tmp_path / "run" / "checkpoint-2"
    state = json.loads((halfway / "epo_state.json").read_text())
    assert len(state["control"]["history"]["steps"]) == 2
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=str(halfway))
    assert len(resumed.entropy_control.state_dict()["history"]["steps"]) == 4
    assert resumed.entropy_control.state_dict() == whole.entropy_control.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for before, after in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        ours = {name for name in before if name.startswith(("entropy", "epo/"))}
        assert {n: before[n] for n in ours} == {n: after[n] for n in ours}

    (halfway / "epo_state.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-2: there is no epo_state\.json"):
        make(**options).train(resume_from_checkpoint=str(halfway))
    with pytest.raises(UserError, match="'epo_strong', this run asks for 'bonus'"):
        make(**options, epo_method="bonus").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    shutil.rmtree(tmp_path / "run")


def test_evaluation_is_trls_and_leaves_the_history_alone(make: Make) -> None:
    trainer = make(per_device_eval_batch_size=4)
    trainer.train()
    state = trainer.entropy_control.state_dict()
    found = trainer.evaluate(Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * 2}))
    assert not [name for name in found if "epo/" in name or "entropy/" in name]
    assert trainer.entropy_control.state_dict() == state


def test_the_example_trains_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Path(__file__).parents[2] / "examples" / "trl_epo.py"
    assert len(example.read_text().splitlines()) < 90
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--steps", "2"])
    trainer = runpy.run_path(str(example), run_name="__main__")["trainer"]
    first, second = [entry for entry in trainer.state.log_history if "epo/beta" in entry]
    assert "entropy/reference" not in first
    assert second["entropy/reference"] == pytest.approx(first["entropy/mean"])
    assert second["reward"] > 0
