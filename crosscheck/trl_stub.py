"""TRL keeps its losses and advantages inside trainer methods. These are the real methods, called on a stub `self` that
has the attributes they read and nothing else: no model, no tokenizer, no optimiser.

Legend for tensor suffixes: _B rows, _L columns of a row.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer


class _OneProcess:
    """The part of `accelerate.Accelerator` the methods use, on one process."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    sync_gradients = True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return tensor


class _Stub(SimpleNamespace):
    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return self.logps_B_L, self.entropies_B_L, None


def _stub(**attributes: Any) -> _Stub:
    common: dict[str, Any] = {
        "accelerator": _OneProcess(),
        "model": torch.nn.Identity().train(),
        "_metrics": {"train": defaultdict(list)},
        "aux_loss_enabled": False,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
    }
    return _Stub(**{**common, **attributes})


def _inputs(mask_B_L: Tensor, **tensors: Tensor) -> dict[str, Tensor]:
    nothing = mask_B_L.new_zeros((mask_B_L.shape[0], 0))
    return {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": mask_B_L,
        "completion_mask": mask_B_L,
        "num_items_in_batch": mask_B_L.sum(),
        **tensors,
    }


def grpo_loss(
    logps_B_L: Tensor,
    mask_B_L: Tensor,
    *,
    advantages: Tensor,
    old_logps_B_L: Tensor,
    loss_type: str = "bnpo",
    reference_logps_B_L: Tensor | None = None,
    entropies_B_L: Tensor | None = None,
    entropy_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    max_completion_length: int = 0,
) -> tuple[Tensor, dict[str, list[float]]]:
    """`GRPOTrainer._compute_loss`: the loss of one batch and the metrics it logs."""
    stub = _stub(
        logps_B_L=logps_B_L,
        entropies_B_L=torch.zeros_like(logps_B_L) if entropies_B_L is None else entropies_B_L,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        loss_type=loss_type,
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        beta=beta,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=max_completion_length,
        _entropy_bonus_enabled=entropy_coef != 0.0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
    )
    inputs = _inputs(mask_B_L, advantages=advantages, old_per_token_logps=old_logps_B_L)
    if reference_logps_B_L is not None:
        inputs["ref_per_token_logps"] = reference_logps_B_L
    loss = GRPOTrainer._compute_loss(stub, stub.model, inputs)  # type: ignore[arg-type]
    return loss, stub._metrics["train"]


def rloo_loss(
    logps_B_L: Tensor, mask_B_L: Tensor, *, advantages_B: Tensor, old_logps_B: Tensor
) -> tuple[Tensor, dict[str, list[float]]]:
    """`RLOOTrainer._compute_loss`, with clip widths 0.2."""
    stub = _stub(logps_B_L=logps_B_L, entropies_B_L=torch.zeros_like(logps_B_L))
    inputs = _inputs(mask_B_L, advantages=advantages_B, old_logps=old_logps_B)
    loss = RLOOTrainer._compute_loss(stub, stub.model, inputs)  # type: ignore[arg-type]
    return loss, stub._metrics["train"]


def advantages(
    rewards_B: Tensor, *, trainer: type, num_generations: int, scale_rewards: str = "group", normalize: bool = False
) -> Tensor:
    """[B] `_generate_and_score_completions` of a trainer, with the sampling and the reward functions left out.

    Groups are consecutive and all of the same size: TRL knows no others.
    """
    num = len(rewards_B)
    texts, ids = ["" for _ in range(num)], [[0] for _ in range(num)]
    grpo = trainer is GRPOTrainer
    stub = _stub(
        logps_B_L=torch.zeros(num, 1, dtype=torch.float64),
        entropies_B_L=torch.zeros(num, 1),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        environment_factories=None,
        environments=None,
        tools=None,
        num_iterations=1,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        num_generations=num_generations,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale_rewards,
        normalize_advantages=normalize,
        reward_clip_range=None,
        reward_weights=torch.ones(1, dtype=rewards_B.dtype),
        reward_func_names=["reward"],
        log_multimodal=False,
        args=SimpleNamespace(
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=num,
        ),
        _logs={"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": [], "extra": {}},
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda _: (ids, ids, None, texts, None, {}, None, None) if grpo else (ids, ids, texts),
        _calculate_rewards=lambda *_: rewards_B[:, None],
    )
    stub.model.is_gradient_checkpointing = False
    return trainer._generate_and_score_completions(stub, [{"prompt": ""} for _ in range(num)])["advantages"]
