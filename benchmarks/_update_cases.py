"""Rows, models and the plain trainer that `update_step.py` measures.

Legend: B rows, T tokens, V vocabulary, N trained tokens of the step, n of a micro-batch, D hidden size.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from epo.config import Config
from epo.objectives import clipped_surrogate, make_control, trajectory_weights
from epo.packing import pack
from epo.recipe import parse_config
from epo.training.batch import flatten
from epo.training.credit import critic_free_advantages
from epo.training.fused_layers import unfuse_layers
from epo.training.learner import Learner
from epo.training.linear import OneDnnLinear
from epo.training.passes import Passes
from epo.training.policy import Policy, load_policy
from epo.training.tiny import build_tokenizer
from epo.types import PackedBatch, StopReason, Task, Trajectory, TrajectoryGroup, Turn

COEFFICIENT = 0.01
"""Of the entropy bonus."""
LEARNING_RATE = 1e-9
"""So small that every update starts from the same weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama with tied embeddings; by default SmolLM2-135M's."""

    vocabulary: int = 49152
    hidden: int = 576
    layers: int = 30
    heads: int = 9
    key_value_heads: int = 3
    intermediate: int = 1536

    @property
    def trunk_parameters(self) -> int:
        """Of the layers, without the embedding."""
        head_size = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * head_size * self.key_value_heads
        return self.layers * (attention + 3 * self.hidden * self.intermediate + 2 * self.hidden) + self.hidden

    def operations(self, batch: PackedBatch, *, head_tokens: int | None = None) -> float:
        """Operations of one forward and backward pass: 6 per parameter and token, in the head for `head_tokens` (the
        trained ones by default); attention's two products per pair of positions that causality lets see each other.
        What is computed again in backward is not counted."""
        head_tokens = batch.num_trained if head_tokens is None else head_tokens
        pairs = sum(len(row) * (len(row) + 1) / 2 for row in batch.rows)
        return (
            6 * self.trunk_parameters * batch.num_tokens
            + 6 * self.vocabulary * self.hidden * head_tokens
            + 12 * pairs * self.hidden * self.layers
        )


def configuration(folder: str, *, compute: str, microbatch_tokens: int, lora_rank: int = 0, groups: int = 1) -> Config:
    return parse_config(
        {
            "model": {"path": folder, "device": "cpu", "max_context": 4096, "compute": compute}
            | {"lora": {"rank": lora_rank}},
            "imitation": {"demonstrations": 0},
            "rollout": {"tasks_per_step": groups, "group_size": 2},
            "algorithm": {"name": "grpo", "dual_clip": None},
            "entropy": {"method": "bonus", "coefficient": COEFFICIENT},
            "optimizer": {"minibatches": 1, "microbatch_tokens": microbatch_tokens, "learning_rate": LEARNING_RATE},
        }
    )


def make_policy(shape: Shape, *, compute: str, lora_rank: int = 0) -> Policy:
    """A random model of that shape, through a model directory as any other."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            intermediate_size=shape.intermediate,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        build_tokenizer(["a door, a cup and a red apple"] * 20, vocabulary_size=300).save_pretrained(folder)
        del model
        config = configuration(folder, compute=compute, microbatch_tokens=1, lora_rank=lora_rank)
        return load_policy(Path(folder), config.model)


def make_groups(
    shape: Shape, *, trajectories: int, tokens: int, trained_share: float, seed: int = 0
) -> list[TrajectoryGroup]:
    """Transcripts of random tokens in pairs, of `tokens` tokens give or take a fifth; responses of 12 tokens."""
    rng = np.random.default_rng(seed)
    response, prompt = 12, 100

    def trajectory(number: int) -> Trajectory:
        made = Trajectory(
            task=Task(suite="made-up", id=str(number // 2), split="train"), stop_reason=StopReason.FAILURE
        )
        length = int(tokens * rng.uniform(0.8, 1.2))
        turns = max(1, round(length * trained_share / response))
        observation = max(1, (length - prompt - response) // max(1, turns - 1) - response)
        read = rng.integers(0, shape.vocabulary, size=prompt)
        for _ in range(turns):
            made.turns.append(
                Turn(
                    prompt_ids=read,
                    response_ids=rng.integers(0, shape.vocabulary, size=response),
                    logprobs=np.full(response, -np.log(shape.vocabulary), dtype=np.float32),
                    entropy=np.full(response, np.log(shape.vocabulary), dtype=np.float32),
                    observation="",
                    response="",
                    action="",
                    is_valid=True,
                    environment_reward=float(rng.normal()),
                )
            )
            more = rng.integers(0, shape.vocabulary, size=observation)
            read = np.concatenate([read, made.turns[-1].response_ids, more])
        return made

    made = [trajectory(number) for number in range(trajectories)]
    return [TrajectoryGroup(task=made[i].task, trajectories=made[i : i + 2]) for i in range(0, trajectories, 2)]


def make_learner(policy: Policy, config: Config) -> Learner:
    return Learner(policy, config, make_control(config.entropy.method, **config.entropy.options()))


def plain_twin(model: nn.Module) -> Any:
    """The model as transformers loads it, on the same parameters: layers, linear layers and attention are its own."""
    twin: Any = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twin.set_attn_implementation("sdpa")
    unfuse_layers(twin)
    for module in twin.modules():
        if type(module) is OneDnnLinear:
            module.__class__ = nn.Linear
    return twin


class PlainTrainer:
    """What a training script with transformers does: the model's own logits of every position, `log_softmax`, entropy,
    a masked loss, AdamW. The same rows, micro-batches and loss as the learner's, under autocast for bfloat16."""

    def __init__(
        self, policy: Policy, config: Config, groups: Sequence[TrajectoryGroup], optimizer: torch.optim.Optimizer
    ) -> None:
        self.policy = policy
        self.model = plain_twin(policy.model)
        self.config = config
        trajectories = [t for group in groups for t in group.trajectories]
        batch = pack(trajectories)
        self.tokens = flatten(batch, trajectories, device=policy.device)
        self.advantages_N = critic_free_advantages([g.trajectories for g in groups], self.tokens, config.algorithm)
        self.entropy_weights_N = trajectory_weights(self.tokens.trajectory_ids_N, self.tokens.turn_ids_N)
        self.micro_batches = Passes(config).micro_batches(batch, self.tokens, range(len(batch.rows)))
        self.optimizer = optimizer

    def update(self) -> float:
        """One optimiser step; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro in self.micro_batches:
            shape = micro.token_ids_B_T.shape

            def spread(values_n: Tensor, micro: Any = micro, shape: Any = shape) -> Tensor:
                """[B, T] with the values of trained tokens at the positions that predict them."""
                spread_B_T = torch.zeros(shape, dtype=values_n.dtype)
                spread_B_T[micro.row_n, micro.source_n] = values_n
                return spread_B_T

            with self.policy.autocast():
                logits_B_T_V = self.model(input_ids=micro.token_ids_B_T, use_cache=False).logits
            logprobs_B_T_V = torch.log_softmax(logits_B_T_V.float() / self.config.rollout.temperature, dim=-1)
            chosen_B_T = logprobs_B_T_V.gather(-1, spread(micro.targets_n)[..., None])[..., 0]
            entropy_B_T = -(logprobs_B_T_V.exp() * logprobs_B_T_V).sum(-1)
            surrogate = clipped_surrogate(
                chosen_B_T,
                spread(self.tokens.old_logprobs_N[micro.index_n]),
                spread(self.advantages_N[micro.index_n]),
                clip_low=self.config.algorithm.clip_low,
                clip_high=self.config.algorithm.clip_high,
                dual_clip=None,
            )
            mask_B_T = spread(torch.ones(len(micro.index_n))) / len(self.tokens.old_logprobs_N)
            bonus_B_T = spread(self.entropy_weights_N[micro.index_n]) * entropy_B_T
            loss = (mask_B_T * surrogate.loss_N).sum() - COEFFICIENT * bonus_B_T.sum()
            torch.autograd.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), self.config.optimizer.grad_clip)
        self.optimizer.step()
        return total
