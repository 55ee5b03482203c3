"""verl's engine loop and loss with EPO's term against the equations in plain loops, in float64.

Turns and trajectories of the loops are written by hand (literal.py). verl divides by an int64 count of tokens, so
agreement is to 1e-12.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from literal import (
    STRONG,
    Row,
    agent_loop_rows,
    beta_of,
    epo_term,
    fill,
    token_mean_surrogate,
    trained,
    turn_rows,
)
from table_engine import TableEngine, loss_of, mini_batch
from torch import Tensor
from torch.testing import assert_close
from verl.workers.config import PolicyLossConfig
from verl.workers.engine import FSDPEngineWithLMHead

from epo.errors import UserError
from epo.integrations.verl import EPOPolicyLossConfig

LAYOUTS = pytest.mark.parametrize("layout", [agent_loop_rows, turn_rows], ids=["agent_loop", "turn_rows"])


def update(engine: TableEngine, rows: list[Row], config: PolicyLossConfig, **split: Any) -> tuple[float, Tensor, dict]:
    """One update of one mini-batch: loss, gradient by all logits, metrics."""
    outputs = engine.forward_backward_batch(mini_batch(rows, **split), loss_of(config))
    engine.lr_scheduler_step()
    assert len(outputs["loss"]) > 1 or split["micro_batch_size"] == len(rows)
    return sum(outputs["loss"]), engine.gradients(), outputs["metrics"]


def expected(
    engine: TableEngine, rows: list[Row], *, reference: dict[int, float] | float | None, beta: float, **options: float
) -> tuple[float, Tensor]:
    logprobs_N, entropy_N = engine.trained(rows)
    options = {"coefficient": 0.001, "alpha": 0.05, "kappa_low": 0.0, "kappa_high": 2.0} | options
    loss = token_mean_surrogate(logprobs_N, rows) + epo_term(entropy_N, rows, reference=reference, beta=beta, **options)
    loss.backward()
    return float(loss.detach()), engine.gradients()


@LAYOUTS
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6, None])
def test_loss_and_gradient_are_those_of_the_equations(layout: Any, micro_batch_size: int | None) -> None:
    """Three updates with a corridor that acts, whatever the micro-batches: the reference is the mean over the updates
    before of the token mean of the sampling policy's entropies."""
    rows = fill(layout(), 0)
    engine = TableEngine(rows)
    means: list[float] = []
    outside = 0.0
    for step in range(3):
        rows = fill(rows, step)
        reference = sum(means) / len(means) if means else None
        wanted = expected(engine, rows, reference=reference, beta=beta_of(step, 10), **STRONG)
        loss, gradients, metrics = update(
            engine, rows, EPOPolicyLossConfig(options=STRONG), micro_batch_size=micro_batch_size
        )
        assert loss == pytest.approx(wanted[0], rel=1e-12)
        assert_close(gradients, wanted[1], rtol=1e-12, atol=1e-12)
        outside += sum(metrics[name].aggregate() for name in ("entropy/below", "entropy/above"))
        means.append(float(trained(rows, "entropy").float().double().mean()))
    assert outside > 0.1


@LAYOUTS
def test_references_by_turn(layout: Any) -> None:
    """The corridor of turn t is around the mean of turn t: turns are numbered as by hand."""
    rows = fill(layout(), 1)
    engine = TableEngine(rows)
    config = EPOPolicyLossConfig(options={**STRONG, "reference": "per_turn"})
    update(engine, rows, config, micro_batch_size=2)
    entropies = trained(rows, "entropy").float().double()
    turns = torch.tensor([turn for row in rows for turn in row.turns])
    reference = {turn: float(entropies[turns == turn].mean()) for turn in turns.tolist()}
    assert len(reference) == 3
    wanted = expected(engine, rows, reference=reference, beta=beta_of(1, 10), **STRONG)
    loss, gradients, _ = update(engine, rows, config, micro_batch_size=2)
    assert loss == pytest.approx(wanted[0], rel=1e-12)
    assert_close(gradients, wanted[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_coefficient_zero_is_verls_own_loss(mode: str) -> None:
    """Bit for bit what `vanilla` gives, with every way of averaging."""
    rows = fill(agent_loop_rows(), 2)
    engine = TableEngine(rows)
    config = EPOPolicyLossConfig(options={"coefficient": 0.0})
    found = engine.forward_backward_batch(mini_batch(rows, micro_batch_size=2), loss_of(config, loss_agg_mode=mode))
    gradients = engine.gradients()
    theirs = FSDPEngineWithLMHead.forward_backward_batch(
        engine, mini_batch(rows, micro_batch_size=2), loss_of(PolicyLossConfig(), loss_agg_mode=mode)
    )
    assert found["loss"] == theirs["loss"]
    assert torch.equal(gradients, engine.gradients())


def test_weights_by_token() -> None:
    """`aggregate: token` is 1/N of the mini-batch, not of the micro-batch."""
    rows = fill(agent_loop_rows(), 3)
    engine = TableEngine(rows)
    config = EPOPolicyLossConfig(method="bonus", options={"coefficient": 0.7, "aggregate": "token"})
    loss, gradients, _ = update(engine, rows, config, micro_batch_size=1)
    logprobs_N, entropy_N = engine.trained(rows)
    wanted = token_mean_surrogate(logprobs_N, rows) - 0.7 * entropy_N.mean()
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert_close(gradients, engine.gradients(), rtol=1e-12, atol=1e-12)


def test_tokens_rejected_inside_a_turn_leave_it_one_turn() -> None:
    """Rejection sampling clears tokens of `response_mask`; `loss_mask` still says where the turns are."""
    rows = fill(agent_loop_rows(), 4)
    rows[5].fields["response_mask"] = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1])
    by_hand = fill(agent_loop_rows(), 4)
    by_hand[5].mask, by_hand[5].turns = rows[5].fields["response_mask"].tolist(), [0, 0, 0, 1, 1, 1, 1]
    engine = TableEngine(rows)
    data = mini_batch(rows, micro_batch_size=2)
    found = engine.forward_backward_batch(
        data, loss_of(EPOPolicyLossConfig(method="bonus", options={"coefficient": 1.0}))
    )
    gradients = engine.gradients()
    logprobs_N, entropy_N = engine.trained(by_hand)
    tokens = len(entropy_N)
    # verl's mean over tokens divides by the count of `loss_mask`.
    surrogate = token_mean_surrogate(logprobs_N, by_hand) * tokens / sum(sum(row.mask) for row in agent_loop_rows())
    none = {"alpha": 0.0, "kappa_low": 0.0, "kappa_high": 2.0}
    wanted = surrogate + epo_term(entropy_N, by_hand, reference=None, beta=1.0, coefficient=1.0, **none)
    wanted.backward()
    assert sum(found["loss"]) == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert_close(gradients, engine.gradients(), rtol=1e-12, atol=1e-12)


def test_metrics_add_up_over_micro_batches() -> None:
    """What is logged does not depend on the split, and is the mini-batch's."""
    found = []
    for size in (1, 6):
        rows = fill(agent_loop_rows(), 5)
        engine = TableEngine(rows)
        config = EPOPolicyLossConfig(options=STRONG)
        update(engine, rows, config, micro_batch_size=size)
        _, _, metrics = update(engine, rows, config, micro_batch_size=size)
        found.append({name: metrics[name].aggregate() for name in metrics if name.startswith(("epo/", "entropy/"))})
    assert found[0].keys() == found[1].keys() >= {"epo/beta", "epo/effective_weight", "entropy/reference"}
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-9), name
    assert found[0]["epo/beta"] == pytest.approx(beta_of(1, 10))
    assert found[0]["entropy/reference"] == pytest.approx(float(trained(rows, "entropy").mean()), rel=1e-6)


def test_several_epochs_count_as_one_update() -> None:
    """verl steps the learning rate once per update of the actor: so does the history, at the mean of the batch."""
    rows = fill(agent_loop_rows(), 6)
    engine = TableEngine(rows)
    for _ in range(3):
        engine.forward_backward_batch(mini_batch(rows, micro_batch_size=3), loss_of(EPOPolicyLossConfig()))
    engine.lr_scheduler_step()
    assert engine._session.step == 1
    assert engine._session.control is not None
    mean = float(trained(rows, "entropy").float().double().mean())
    assert engine._session.control.reference == pytest.approx(mean, rel=1e-12)


def test_inference_with_a_loss_leaves_no_trace() -> None:
    rows = fill(agent_loop_rows(), 7)
    engine = TableEngine(rows)
    with torch.no_grad():
        engine.forward_backward_batch(
            mini_batch(rows, micro_batch_size=3), loss_of(EPOPolicyLossConfig()), forward_only=True
        )
    assert engine._session._observed == []


def refused(rows: list[Row], config: PolicyLossConfig, **actor: Any) -> str:
    engine = TableEngine(rows)
    engine.with_entropy = actor.pop("calculate_entropy", True)
    with pytest.raises(UserError) as error:
        engine.forward_backward_batch(mini_batch(rows, micro_batch_size=2), loss_of(config, **actor))
    return str(error.value)


def test_what_verl_must_be_told_is_said() -> None:
    rows = fill(agent_loop_rows(), 8)
    assert "calculate_entropy=True" in refused(rows, EPOPolicyLossConfig(), calculate_entropy=False)
    assert "entropy_coeff" in refused(rows, EPOPolicyLossConfig(), entropy_coeff=0.01)
    assert "loss_mode=epo" in refused(rows, PolicyLossConfig())
    for row in rows:
        del row.names["session_id"]
    assert "traj_uid" in refused(rows, EPOPolicyLossConfig())


def test_the_loss_mode_alone_takes_the_papers_values() -> None:
    """`policy_loss.loss_mode=epo` without options, in verl's own configuration."""
    rows = fill(agent_loop_rows(), 9)
    engine = TableEngine(rows)
    loss, gradients, _ = update(engine, rows, PolicyLossConfig(loss_mode="epo"), micro_batch_size=2)
    wanted = expected(engine, rows, reference=None, beta=2.0)
    assert loss == pytest.approx(wanted[0], rel=1e-12)
    assert_close(gradients, wanted[1], rtol=1e-12, atol=1e-12)


def test_rows_of_one_trajectory_must_say_which_turns_they_are() -> None:
    rows = fill(turn_rows(), 10)
    for row in rows:
        del row.names["turn_index"]
    assert "turn_index" in refused(rows, EPOPolicyLossConfig())
    for row, turn in zip(rows, (2, 0, 0, 1, 1, 0), strict=True):
        row.names["extra_fields"] = {"turn_index": turn}
    engine = TableEngine(rows)
    loss, _, _ = update(engine, rows, EPOPolicyLossConfig(), micro_batch_size=2)
    assert loss == pytest.approx(expected(engine, rows, reference=None, beta=2.0)[0], rel=1e-12)


def test_without_the_sampling_policys_entropies_there_is_no_history() -> None:
    rows = fill(agent_loop_rows(), 11)
    for row in rows:
        del row.fields["entropy"]
    assert "bypass_mode" in refused(rows, EPOPolicyLossConfig())


def test_the_loss_refuses_an_engine_that_adds_no_term() -> None:
    """verl's own engine with loss_mode=epo would be vanilla without a word."""
    rows = fill(agent_loop_rows(), 12)
    engine = TableEngine(rows)
    with pytest.raises(UserError, match="model_type=epo"):
        FSDPEngineWithLMHead.forward_backward_batch(
            engine, mini_batch(rows, micro_batch_size=2), loss_of(EPOPolicyLossConfig())
        )


def test_warnings_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = fill(agent_loop_rows(), 13)
    engine = TableEngine(rows)
    for _ in range(2):
        update(engine, rows, EPOPolicyLossConfig(), micro_batch_size=2)
    assert [record.message for record in caplog.records if "no floor" in record.message] == [
        "epo: kappa_low = 0: the corridor has no floor, it cannot stop entropy from collapsing"
    ]
