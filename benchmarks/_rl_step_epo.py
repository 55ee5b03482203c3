"""The process in which epo takes RL steps for rl_step.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from _rl_step_game import Clock, Scenario, answer, peak_bytes, wait_for_call
from _rl_step_model import row_tokens
from transformers.utils import logging

from epo.config import Config
from epo.environments.pool import EnvPool
from epo.environments.registry import make_suite, register_suite
from epo.packing import pack
from epo.recipe import parse_config
from epo.training.policy import load_policy
from epo.training.run_folder import RunFolder
from epo.training.session import ThisProcess
from epo.training.trainer import Trainer


class Silent:
    """An observer that looks away."""

    def begin(self, what: str, total: int) -> None: ...
    def advance(self, done: int, note: str = "") -> None: ...
    def step(self, step: int, metrics: dict[str, float]) -> None: ...
    def evaluated(self, step: int, results: Any) -> None: ...
    def note(self, text: str) -> None: ...


def configuration(scenario: Scenario, model: Path, *, entropy: str) -> Config:
    return parse_config(
        {
            "steps": 10_000,
            "environment": {
                "suite": "endless",
                "options": {"words": scenario.observation_words},
                "max_turns": scenario.turns,
                "workers": scenario.episodes,
            },
            "agent": {
                "context": "transcript",
                "format": "action",
                "prompt": "brief",
                "max_response_tokens": scenario.response_tokens,
                "invalid_action_penalty": 0.0,
            },
            "model": {
                "path": str(model),
                "max_context": scenario.max_context,
                "device": "cpu",
                "threads": scenario.threads,
                "dtype": "float32",
                "compute": scenario.compute,
            },
            "imitation": {"demonstrations": 0},
            "rollout": {"tasks_per_step": scenario.tasks, "group_size": scenario.group},
            "algorithm": {"name": "grpo"},
            "entropy": {"method": entropy},
            "optimizer": {
                "learning_rate": scenario.learning_rate,
                "warmup_fraction": 0.0,
                "min_ratio": 1.0,
                "weight_decay": 0.0,
                "minibatches": 1,
                "microbatch_tokens": scenario.rows_per_pass * row_tokens(scenario, model),
            },
            "evaluation": {"splits": []},
        }
    )


def work(folder: Path, *, entropy: str = "none") -> None:
    """Serve `Trainer.collect`, `Learner.rescore` and `Learner.update`, the calls of every step of `Trainer.train`."""
    logging.set_verbosity_error()
    scenario = Scenario.load(folder)
    torch.set_num_threads(scenario.threads)
    register_suite("endless", "_rl_step_game:EndlessSuite")
    config = configuration(scenario, folder / "model", entropy=entropy)
    policy = load_policy(folder / "model", config.model)
    policy.chat.stop_id = policy.tokenizer.eos_token_id  # not <|im_end|>, which can be drawn
    suite = make_suite("endless", config.environment.options)
    run = RunFolder.create(folder / "epo-run", config, {})
    clock = Clock()
    with (
        EnvPool("endless", config.environment.options, size=config.environment.workers) as pool,
        ThisProcess(config, pool).parts(policy, None, run) as parts,
    ):
        trainer = Trainer(config, suite, run, Silent(), learner=parts.learner, collector=parts.collector)
        answer({})
        sampler: Any = parts.collector._sampler  # its counters are shown nowhere else
        passes: list[int] = []
        policy.trunk.register_forward_pre_hook(lambda *_: passes.append(1) if torch.is_grad_enabled() else None)
        for step in itertools.count():
            wait_for_call()
            before = sampler.prefilled_tokens
            passes.clear()
            clock.start()
            groups = trainer.collect(step)
            clock.mark()
            groups = trainer.learner.rescore(groups)
            metrics = trainer.learner.update(groups, step=step)
            clock.mark()
            timing = trainer.collector.timing
            rollout = {"environment": timing.environment, "prefill": timing.prefill, "decode": timing.decode}
            trajectories = [t for group in groups for t in group.trajectories]
            answer(
                {
                    **clock.between(),
                    "work": {
                        "episodes": len(trajectories),
                        "turns": sum(len(t.turns) for t in trajectories),
                        "sampled": sum(t.num_tokens for t in trajectories),
                        "row_tokens": pack(trajectories).num_tokens,
                        "trained": int(metrics["tokens/trained"]),
                        "optimizer_steps": int(metrics["update/optimizer_steps"]),
                    },
                    "cost": {
                        "prefilled": sampler.prefilled_tokens - before,
                        # Every live episode draws a token in each; a turn's first comes out of its prefill.
                        "decode_passes": scenario.turns * (scenario.response_tokens - 1),
                        "updated": int(metrics["tokens/processed"]),
                        "head": int(metrics["tokens/trained"]),
                        "update_passes": len(passes),
                    },
                    "seconds": rollout | trainer.learner.seconds(),
                    "peak_bytes": peak_bytes(),
                }
            )
