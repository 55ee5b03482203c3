"""verl's FSDP engine with EPO, its network replaced by a table of float64 logits: splits, scaling, loss are verl's.

Legend for tensor suffixes: _B rows, _P positions of a row (prompt and response), _V vocabulary.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from literal import VOCABULARY, Row, batch_of
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from epo.integrations.verl import EPOEngine
from epo.integrations.verl.session import Session


class TableEngine(EPOEngine):
    """Logits of each row by its column `row`; everything before and after the network is verl's code."""

    def __init__(self, rows: list[Row], *, total_steps: int = 10) -> None:
        generator = torch.Generator().manual_seed(99)
        self.logits = [
            torch.randn(len(row.fields["input_ids"]), VOCABULARY, dtype=torch.float64, generator=generator)
            for row in rows
        ]
        for logits_P_V in self.logits:
            logits_P_V.requires_grad_()
        self.ulysses_sequence_parallel_size = 1
        self.ulysses_device_mesh = None
        self.optimizer_config = SimpleNamespace(total_training_steps=total_steps)
        self.engine_config = SimpleNamespace(use_no_sync_for_gradient_accumulation=False)
        self.scaler = None
        self.lr_scheduler = SimpleNamespace(step=lambda: None, get_last_lr=lambda: [0.0])
        self.with_entropy = True
        self._session = Session()

    def get_data_parallel_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> None:
        return None

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        del forward_only
        statistics = [
            self.statistics(int(row), ids)
            for row, ids in zip(micro_batch["row"], micro_batch["input_ids"].unbind(), strict=True)
        ]
        offsets = micro_batch["input_ids"].offsets()
        output = {
            name: torch.nested.nested_tensor_from_jagged(torch.cat([found[name] for found in statistics]), offsets)
            for name in ("log_probs", "entropy")
        }
        if not self.with_entropy:
            del output["entropy"]
        loss, metrics = loss_function(model_output=output, data=micro_batch, dp_group=None)
        return loss, {"loss": loss.detach().item(), "metrics": metrics}

    def statistics(self, row: int, input_ids_P: Tensor) -> dict[str, Tensor]:
        """[P] of the next token at each position, as verl's engine gives them."""
        logprobs_P_V = self.logits[row].log_softmax(-1)
        following_P = input_ids_P.roll(-1)
        return {
            "log_probs": logprobs_P_V.gather(-1, following_P[:, None]).squeeze(-1),
            "entropy": -(logprobs_P_V.exp() * logprobs_P_V).sum(-1),
        }

    def trained(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """[N] log-probability and entropy of the trained tokens, in the order of the rows."""
        found: list[list[Tensor]] = [[], []]
        for index, row in enumerate(rows):
            mask = torch.tensor(row.mask).bool()
            statistics = self.statistics(index, row.fields["input_ids"])
            start = len(row.fields["prompts"]) - 1
            for part, name in zip(found, ("log_probs", "entropy"), strict=True):
                part.append(statistics[name][start : start + len(mask)][mask])
        return torch.cat(found[0]), torch.cat(found[1])

    def gradients(self) -> Tensor:
        """All gradients in one vector, cleared."""
        flat = torch.cat(
            [(logits.grad if logits.grad is not None else torch.zeros_like(logits)).flatten() for logits in self.logits]
        )
        for logits in self.logits:
            logits.grad = None
        return flat


def mini_batch(rows: list[Row], *, micro_batch_size: int | None = None, **more: Any) -> TensorDict:
    """The rows as a mini-batch of verl's; without a size of micro-batches, dynamic ones of few tokens."""
    data = batch_of(rows)
    data["row"] = torch.arange(len(rows))
    split = (
        {"use_dynamic_bsz": True, "max_token_len_per_gpu": 24}
        if micro_batch_size is None
        else {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": micro_batch_size}
    )
    tu.assign_non_tensor(data, global_batch_size=len(rows), **split, **more)
    return data


def loss_of(policy_loss: PolicyLossConfig, **actor: Any) -> Any:
    """verl's actor loss as its worker makes it."""
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss, **actor
    )
    return partial(ppo_loss, config=config)
