"""Real verl workers on a CPU: `python worker_run.py FOLDER`, one process per rank, with the environment of torchrun.

verl's `TrainingWorker`, its FSDP2 engine, its iterator over mini-batches and its checkpoints, on a Llama of 6,000
parameters and plain SGD, so that a step of the parameters is the gradient. Rank 0 writes what the tests read.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from literal import STRONG, VOCABULARY, Row, agent_loop_rows, batch_of, fill, turn_rows
from transformers import LlamaConfig, LlamaForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    PolicyLossConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from epo.integrations.verl import EPOPolicyLossConfig


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def worker(folder: Path, policy_loss: PolicyLossConfig, *, model_type: str = "epo", **engine: Any) -> TrainingWorker:
    """As verl's `ActorRolloutRefWorker.init_model` makes the actor's."""
    checkpoint = ["model", "optimizer", "extra"]
    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    split = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1} | engine
    made = TrainingWorker(
        TrainingWorkerConfig(
            model_type=model_type,
            model_config=HFModelConfig(
                path=str(folder / "model"),
                load_tokenizer=False,
                use_remove_padding=False,
                enable_gradient_checkpointing=False,
                override_config={"attn_implementation": "eager"},
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2", model_dtype="fp32", use_torch_compile=False, mixed_precision=precision, **split
            ),
            optimizer_config=FSDPOptimizerConfig(
                optimizer="SGD",
                optimizer_impl="torch.optim",
                lr=1.0,
                weight_decay=0.0,
                betas=None,
                clip_grad=1e9,
                total_training_steps=10,
            ),
            checkpoint_config=CheckpointConfig(save_contents=checkpoint, load_contents=checkpoint),
        )
    )
    made.reset()
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, calculate_entropy=True, policy_loss=policy_loss
    )
    made.set_loss_fn(partial(ppo_loss, config=config))
    return made


def update(actor: TrainingWorker, rows: list[Row], *, mini_batch_size: int | None = None) -> dict[str, Any]:
    """One update of the actor, with this rank's share of the rows, and what verl's trainer adds to the batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    share = len(rows) // ranks
    data = batch_of(rows[rank * share : (rank + 1) * share])
    size = mini_batch_size or len(rows)
    extra = {"global_batch_size": size, "mini_batch_size": size, "epochs": 1, "seed": 42, "temperature": 1.0}
    tu.assign_non_tensor(data, calculate_entropy=True, dataloader_kwargs={"shuffle": False}, **extra)
    return tu.get(actor.train_mini_batch(data), "metrics")


def parameters(actor: TrainingWorker) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in actor.engine.get_per_tensor_param()[0]}


def batches(layout: Any) -> list[list[Row]]:
    return [fill(layout(), seed, dtype=torch.float32) for seed in (0, 1)]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        save_model(folder / "model")
    dist.barrier()
    results: dict[str, Any] = {}
    epo = EPOPolicyLossConfig(options=STRONG)
    for layout in (agent_loop_rows, turn_rows):
        for name, engine in (
            ("one", {}),
            ("three", {"micro_batch_size_per_gpu": 3}),
            ("dynamic", {"use_dynamic_bsz": True, "max_token_len_per_gpu": 24}),
        ):
            actor = worker(folder, epo, **engine)
            results[f"{layout.__name__}/{name}/0"] = parameters(actor)
            for step, rows in enumerate(batches(layout)):
                metrics = update(actor, rows)
                results[f"{layout.__name__}/{name}/{step + 1}"] = parameters(actor)
            results[f"{layout.__name__}/{name}/metrics"] = {
                key: [float(value) for value in values] for key, values in metrics.items()
            }

    # Saved after the first update, gone on with by a new worker.
    first, second = batches(agent_loop_rows)
    actor = worker(folder, epo, micro_batch_size_per_gpu=3)
    update(actor, first)
    actor.save_checkpoint(str(folder / "checkpoint"), global_step=1)
    actor = worker(folder, epo, micro_batch_size_per_gpu=3)
    actor.load_checkpoint(str(folder / "checkpoint"))
    update(actor, second)
    results["resumed"] = parameters(actor)
    states = [None] * dist.get_world_size()
    session = actor.engine._session
    dist.all_gather_object(states, json.dumps([session.step, session.control.state_dict()]))
    results["states"] = states

    # Coefficient 0 against verl's own engine, registered for accelerators, and its own loss.
    zero = worker(folder, EPOPolicyLossConfig(options={"coefficient": 0.0}))
    update(zero, first, mini_batch_size=2)
    os.environ["VERL_ENGINE_DEVICE"] = "cuda"
    plain = worker(folder, PolicyLossConfig(), model_type="language_model")
    del os.environ["VERL_ENGINE_DEVICE"]
    update(plain, first, mini_batch_size=2)
    results["zero"], results["plain"] = parameters(zero), parameters(plain)
    results["plain_engine"] = type(plain.engine).__name__

    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
