"""One of two processes that train together: `torch.distributed.run two_processes.py MODEL FOLDER`, for a test."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from scripted import EPO, Scripted
from transformers import AutoModelForCausalLM, AutoTokenizer

from epo.integrations.trl import EPOConfig, EPOTrainer
from epo.training.policy import Policy

model, folder = Path(sys.argv[1]), Path(sys.argv[2])
policy = Policy(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model), max_context=256)
trainer, gradients = Scripted(policy, folder).run(
    EPOTrainer,
    EPOConfig,
    rewards=False,
    max_steps=2,
    gradient_accumulation_steps=2,
    ddp_backend="gloo",
    **EPO,
)
assert trainer.accelerator.num_processes == 2
name = f"rank{trainer.accelerator.process_index}.pt"
history = trainer.entropy_control.state_dict()["history"]["steps"]
torch.save({"gradients": gradients.steps, "log": trainer.state.log_history, "history": history}, folder / name)
