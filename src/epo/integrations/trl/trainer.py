"""`GRPOTrainer` with an entropy control method of ours in its loss.

What TRL calls a generation batch is an RL step here: its completions were all drawn by the same weights. It is trained
on in `steps_per_generation` micro-batches, `num_iterations` times.

Legend for tensor suffixes: _B rows (trajectories) of this process, _T positions of the completion, _N trained tokens
of all processes, _R those of this process, _n of a micro-batch.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from epo.errors import UserError
from epo.files import write_atomically
from epo.integrations.trl.compatibility import GRPOTrainer, check_instance, installed_version
from epo.integrations.trl.config import EPOConfig
from epo.integrations.trl.tokens import turn_ids, turn_metrics
from epo.objectives import EntropyControl, gather_tokens, trajectory_weights
from epo.objectives.ranks import gather_numbers

STATE_FILE = "epo_state.json"
"""Beside TRL's files in every checkpoint."""

logger = get_logger(__name__)


class EPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer`, whose loss has the entropy term of `EPOConfig` in it. Everything else is TRL's.

    The term of a generation batch has weights of all its trajectories, on all processes, so that it does not depend on
    how they are cut into micro-batches. An RL step's entropies are those of the policy that sampled it. They join the
    history when its last micro-batch was trained on, and with it every checkpoint.

    Logs `entropy/*` and `epo/*` (docs/metrics.md) once per RL step.

    Example::

        trainer = EPOTrainer(
            model="Qwen/Qwen3-0.6B",
            args=EPOConfig(output_dir="run", max_steps=100, epo_method="epo_strong", epo_coefficient=0.001),
            environment_factory=MyEnvironment,
        )
        trainer.train()
    """

    entropy_control: EntropyControl

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: EPOConfig | None = None, *more: Any, **rest: Any
    ) -> None:
        """Take what `trl.GRPOTrainer` takes.

        Args:
            model: as TRL's.
            reward_funcs: as TRL's.
            args: an `EPOConfig`; required.
            more: as TRL's.
            rest: as TRL's.

        Raises:
            UserError: `args` is no `EPOConfig`, or TRL lacks something that is built on.
        """
        if not isinstance(args, EPOConfig):
            raise UserError(f"EPOTrainer needs args=EPOConfig(...), got {type(args).__name__}")
        self._method = args.epo_method
        self._slices = cast("int", args.steps_per_generation)  # TRL has filled it in
        self.entropy_control = args.make_control()
        self._entropies_B_T: Tensor | None = None
        self._scored: list[Tensor] | None = None
        self._drawn: list[tuple[Tensor, Tensor, Tensor]] = []
        self._term_metrics: dict[str, float] = defaultdict(float)
        super().__init__(model, reward_funcs, args, *more, **rest)
        check_instance(self)
        for warning in self.entropy_control.warnings():
            logger.warning(warning)

    @property
    def rl_step(self) -> int:
        """k, by the optimiser steps taken so far."""
        return self.state.global_step * self.args.gradient_accumulation_steps // self._passes_per_rl_step

    @property
    def total_rl_steps(self) -> int:
        """K, by all optimiser steps of the training; the last RL step may be cut short."""
        passes = self.state.max_steps * self.args.gradient_accumulation_steps
        return max(1, -(-passes // self._passes_per_rl_step))

    @property
    def _passes_per_rl_step(self) -> int:
        return self._slices * self.num_iterations

    @property
    def _is_training(self) -> bool:
        """TRL tells training from evaluation by this."""
        return self.model is not None and self.model.training

    # ---------------------------------------------------------------- generation

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch, with what the entropy term needs. TRL shuffles and cuts all of it alike."""
        if not self._is_training:
            return super()._generate_and_score_completions(inputs)
        self._scored = []
        try:
            output = super()._generate_and_score_completions(inputs)
            scored = self._scored
        finally:
            self._scored = None
        # A batch that TRL did not finish, before a checkpoint was resumed from, says nothing.
        self._drawn.clear()
        self._term_metrics.clear()

        mask_B_T = output["completion_mask"]
        if "tool_mask" in output:
            mask_B_T = mask_B_T * output["tool_mask"]
        turns_B_T = turn_ids(mask_B_T)
        rows = len(mask_B_T)
        rows_B = torch.arange(rows, device=mask_B_T.device) + rows * self.accelerator.process_index
        is_trained_B_T = turns_B_T >= 0
        trajectories_B_T = rows_B[:, None].expand_as(turns_B_T)
        (trajectories_N, turns_N), own = gather_tokens(trajectories_B_T[is_trained_B_T], turns_B_T[is_trained_B_T])
        if self.entropy_control.aggregate == "trajectory":
            weights_N = trajectory_weights(trajectories_N, turns_N, dtype=torch.float32)
        else:
            weights_N = torch.full(turns_N.shape, 1 / max(1, len(turns_N)), device=turns_N.device)
        weights_B_T = torch.zeros(turns_B_T.shape, device=turns_B_T.device)
        weights_B_T[is_trained_B_T] = weights_N[own]
        output |= {"turn_ids": turns_B_T, "trajectory_ids": trajectories_B_T, "entropy_weights": weights_B_T}
        if "old_per_token_logps" in output:
            # The pass for these comes before any of the reference model.
            output["old_entropies"] = scored[0]
        return output

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, and keep the entropies, which TRL does not hand on."""
        # The head of a reference model computes none.
        if self._scored is not None and model is self.model:
            kwargs["compute_entropy"] = True
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._entropies_B_T = result[1]
        if self._scored is not None and result[1] is not None:
            self._scored.append(result[1])
        return result

    # ---------------------------------------------------------------- update

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss of a micro-batch, and its share of the entropy term. Evaluation has no such term."""
        loss = super()._compute_loss(model, inputs)
        entropies_B_T, self._entropies_B_T = self._entropies_B_T, None
        if not self._is_training:
            return loss
        if entropies_B_T is None or (torch.is_grad_enabled() and not entropies_B_T.requires_grad):
            raise UserError(
                f"TRL {installed_version()} computes no entropy that a gradient could flow through: "
                "there is nothing for EPO to train"
            )
        is_trained_B_T = inputs["turn_ids"] >= 0
        turns_n = inputs["turn_ids"][is_trained_B_T]
        entropy_n = entropies_B_T[is_trained_B_T]
        term = self.entropy_control.entropy_loss(
            entropy_n,
            inputs["entropy_weights"][is_trained_B_T],
            turns_n,
            step=self.rl_step,
            total_steps=self.total_rl_steps,
        )
        if self._step // self._slices % self.num_iterations == 0:
            # Without TRL's old ones these are the sampling policy's: the whole batch is part of one optimiser step.
            sampling_n = inputs["old_entropies"][is_trained_B_T] if "old_entropies" in inputs else entropy_n.detach()
            self._drawn.append((sampling_n, inputs["trajectory_ids"][is_trained_B_T], turns_n))
        for name, value in {"entropy/loss": float(term.loss.detach()), **term.metrics}.items():
            self._term_metrics[name] += value / self.num_iterations
        # The weights sum to 1 over the generation batch and all processes; those of an optimiser step, which may see a
        # part of the batch, shall too, and gradients of processes are averaged, not summed.
        share = self._slices / self.current_gradient_accumulation_steps
        return loss + share * self.accelerator.num_processes * term.loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, and end the RL step with its last micro-batch."""
        loss = super().training_step(*args, **kwargs)
        if self._step % self._passes_per_rl_step == 0:
            self._end_rl_step()
        return loss

    def _end_rl_step(self) -> None:
        own = [torch.cat(part) for part in zip(*self._drawn, strict=True)]
        (entropy_N, trajectories_N, turns_N), _ = gather_tokens(*own)
        parts = gather_numbers(self._term_metrics, device=entropy_N.device)
        metrics = {name: math.fsum(part[name] for part in parts) for name in self._term_metrics}
        for name, value in {**metrics, **turn_metrics(entropy_N, trajectories_N, turns_N)}.items():
            self._metrics["train"][name].append(value)
        self.entropy_control.observe(entropy_N, trajectories_N, turns_N)
        self._drawn.clear()
        self._term_metrics.clear()

    # ---------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's, with the state of the entropy control; that first, as TRL may send the folder away when it is done."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            state = {"method": self._method, "control": self.entropy_control.state_dict()}
            write_atomically(folder / STATE_FILE, json.dumps(state))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """TRL's, with the state of the entropy control."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / STATE_FILE
        if not file.is_file():
            raise UserError(
                f"resume_from_checkpoint={checkpoint}: there is no {STATE_FILE}, so EPOTrainer did not write it; to "
                "start from its weights, pass the folder as the model"
            )
        state = json.loads(file.read_text(encoding="utf-8"))
        if state["method"] != self._method:
            raise UserError(
                f"resume_from_checkpoint={checkpoint} was trained with epo_method={state['method']!r}, this run asks "
                f"for {self._method!r}"
            )
        try:
            self.entropy_control.load_state_dict(state["control"])
        except ValueError as error:
            raise UserError(f"resume_from_checkpoint={checkpoint}: {error}") from error
