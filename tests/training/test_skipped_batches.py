"""A loss or a gradient that is not finite changes no weight, is counted, and leaves its batch to be looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quiet import QuietObserver
from safetensors.torch import load_file
from test_runs_repeat import files_of, metrics_of

from epo.config import Config
from epo.training.learner import Learner
from epo.training.session import train_run

MakeConfig = Callable[..., Config]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`spoil(3, advantage=nan)` or `spoil(3, gradient=inf)`: in RL step 3, of its trained token or weight 7."""

    def choose(*steps: int, advantage: float | None = None, gradient: float | None = None) -> None:
        prepare, update, step_once = Learner._prepare, Learner.update, Learner._step
        now = [0]

        def noting_update(self: Learner, groups: Any, *, step: int) -> dict[str, float]:
            now[0] = step + 1
            return update(self, groups, step=step)

        def spoiled_prepare(self: Learner, survivors: Any) -> Any:
            data = prepare(self, survivors)
            if now[0] in steps and advantage is not None:
                data.advantages_N[7] = advantage
            return data

        def spoiled_step(self: Learner, metrics: dict[str, float]) -> bool:
            if now[0] in steps and gradient is not None:
                next(iter(self.policy.parameters())).grad.view(-1)[7] = gradient
            return step_once(self, metrics)

        monkeypatch.setattr(Learner, "update", noting_update)
        monkeypatch.setattr(Learner, "_prepare", spoiled_prepare)
        monkeypatch.setattr(Learner, "_step", spoiled_step)

    return choose


@pytest.mark.parametrize(
    ("what", "precision"),
    [({"advantage": math.nan}, "float32"), ({"advantage": -math.inf}, "bfloat16"), ({"gradient": math.inf}, "float32")],
)
def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(
    what: dict[str, float], precision: str, spoil: Callable[..., None], minute_config: MakeConfig, tmp_path: Path
):
    spoil(2, **what)
    run, observer = tmp_path / "run", QuietObserver()
    config = minute_config(
        *("steps=3", "optimizer.minibatches=1", "checkpoint.every=1", "checkpoint.keep=3", "evaluation.every=0"),
        *("logging.to=[]", f"model.compute={precision}"),
    )
    assert train_run(config, run, observer, resume=False)["finished"]
    assert [line["update/skipped"] for line in metrics_of(run)] == [0.0, 1.0, 0.0]
    assert all(line["health/gradient_spike"] == (line["step"] >= 2) for line in metrics_of(run)[:2])
    weights = [files_of(run / "checkpoints" / f"step_{k:06d}", "*.safetensors") for k in (1, 2, 3)]
    assert weights[0] == weights[1] != weights[2]
    for tensor in load_file(run / "checkpoints" / "step_000003" / "policy" / "model.safetensors").values():
        assert bool(torch.isfinite(tensor).all())
    (folder,) = (run / "skipped").iterdir()
    assert folder.name == "step_000002_minibatch_0"
    assert any(str(folder) in note for note in observer.notes)


def test_the_batch_is_the_one_that_was_trained_on(
    spoil: Callable[..., None], minute_config: MakeConfig, tmp_path: Path
):
    spoil(1, advantage=math.nan)
    run = tmp_path / "run"
    config = minute_config("steps=1", "algorithm.name=ppo", "entropy.method=epo", "logging.to=[]")
    train_run(config, run, QuietObserver(), resume=False)
    (folder,) = (run / "skipped").iterdir()  # one of two mini-batches
    tensors = load_file(folder / "batch.safetensors")

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    told = json.loads((folder / "batch.json").read_text(), parse_constant=refuse)
    assert told["step"] == 1 and told["values_not_finite"] == {"advantages_N": 1}
    assert told["numbers"]["policy/loss"] == "nan" and math.isfinite(told["numbers"]["value/loss"])
    assert told["shapes"] == {name: list(tensor.shape) for name, tensor in tensors.items()}
    played = [json.loads(x) for x in (run / "trajectories" / "step_000001.jsonl").read_text().splitlines()]
    chosen = [played[k] for k in tensors["row_trajectories_B"].tolist()]
    assert 0 < len(chosen) < len(played)
    drawn = [turn for trajectory in chosen for turn in trajectory["turns"]]
    assert tensors["token_ids_T"][tensors["trained_T"]].tolist() == [i for turn in drawn for i in turn["response_ids"]]
    logprobs = torch.tensor([x for turn in drawn for x in turn["logprobs"]])
    torch.testing.assert_close(tensors["sampler_logprobs_N"], logprobs, atol=1e-5, rtol=0)
    assert len(tensors["token_ids_T"]) == int(tensors["row_lengths_B"].sum())
    assert tensors["weights_N"].sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_gradients_that_were_not_finite_are_named(
    spoil: Callable[..., None], minute_config: MakeConfig, tmp_path: Path
):
    spoil(1, gradient=math.inf)
    train_run(minute_config("steps=1", "logging.to=[]"), tmp_path / "run", QuietObserver(), resume=False)
    for folder in (tmp_path / "run" / "skipped").iterdir():
        told = json.loads((folder / "batch.json").read_text())
        assert told["gradients_not_finite"] == ["policy.model.embed_tokens.weight"]
        assert told["numbers"]["policy/grad_norm"] == "inf" and told["values_not_finite"] == {}


@pytest.mark.parametrize(("keep", "expected"), [(3, ["1_minibatch_0", "1_minibatch_1", "2_minibatch_0"]), (0, [])])
def test_only_the_first_are_kept(
    keep: int, expected: list[str], spoil: Callable[..., None], minute_config: MakeConfig, tmp_path: Path
):
    spoil(1, 2, gradient=math.nan)
    config = minute_config("steps=2", f"record.skipped={keep}", "logging.to=[]", "evaluation.every=0")
    train_run(config, tmp_path / "run", QuietObserver(), resume=False)
    assert [line["update/skipped"] for line in metrics_of(tmp_path / "run")] == [2.0, 2.0]
    assert sorted(p.name for p in (tmp_path / "run").glob("skipped/*")) == [f"step_00000{name}" for name in expected]
