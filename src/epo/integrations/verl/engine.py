# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false
"""verl's FSDP engine under the name `epo`: it adds the entropy term to what verl's loss returns.

verl calls a loss for each micro-batch with its rows and the model's output; what the term needs beyond those is the
mini-batch (the weights of equation E2), the run (history, step), and the turns. An engine is the place in verl that
sees all of them, is chosen by configuration, and saves and loads the actor's checkpoint.

Legend for tensor suffixes: _B rows, _L columns of a response, _R trained tokens of this rank, _M of a micro-batch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils.device import get_device_id
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.utils.padding import no_padding_2_padding

from epo.errors import UserError
from epo.integrations.verl.policy_loss import LOSS_MODE, EPOPolicyLossConfig, loss_call
from epo.integrations.verl.rows import TURNS, WEIGHTS, Tokens, name_tokens
from epo.integrations.verl.session import Session
from epo.objectives import EntropyControl

MODEL_TYPE = "epo"


class EntropyTermMixin:
    """What an engine of verl needs to be one for EPO; goes before the engine's class."""

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        """As verl's engines."""
        # `epo` has chosen this class; verl builds a causal model under the name `language_model` alone.
        model_config.model_type = "language_model"
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)  # type: ignore[call-arg]
        self._session = Session()

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        """One mini-batch, its loss with the entropy term.

        Raises:
            UserError: the rows, the model's output or the configuration lack what the term needs.
        """
        forward: Any = super().forward_backward_batch  # type: ignore[misc]
        if loss_function is None:
            return forward(data, loss_function, forward_only=forward_only)
        tokens = name_tokens(data, group=self._group, device=get_device_id())
        outputs = forward(data, partial(self._loss, loss_function, tokens.total), forward_only=forward_only)
        if self._session.observes and not forward_only:
            self._session.keep(_sampling_entropy(data, tokens), tokens.trajectories_R, tokens.turns_R)
        return outputs

    def lr_scheduler_step(self) -> Any:
        """verl's last call of an update of the actor: the update is observed here."""
        self._session.end_update(group=self._group, device=get_device_id())
        return super().lr_scheduler_step()  # type: ignore[misc]

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """As verl's, with `epo_state.json` beside the weights."""
        super().save_checkpoint(local_path, *args, **kwargs)  # type: ignore[misc]
        if local_path is not None:
            self._session.save(Path(local_path))

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """As verl's.

        Raises:
            UserError: `epo_state.json` is missing or not readable.
        """
        if local_path is not None:
            self._session.restore(Path(local_path))
        super().load_checkpoint(local_path, *args, **kwargs)  # type: ignore[misc]

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self.get_data_parallel_group()  # type: ignore[attr-defined]

    def _loss(self, loss_function: Any, total: int, *args: Any, **kwargs: Any) -> Any:
        """verl's loss of a micro-batch plus the term's part of it. `total`: tokens of the mini-batch on all ranks."""
        if "model_output" not in kwargs:
            # Top-k distillation calls the same function to work on logits.
            return loss_function(*args, **kwargs)
        with loss_call() as call:
            loss, metrics = loss_function(*args, **kwargs)
        if call.actor_config is None:
            raise UserError(
                f"actor_rollout_ref.model.model_type={MODEL_TYPE} adds an entropy term that nothing asks for: set "
                f"actor_rollout_ref.actor.policy_loss.loss_mode={LOSS_MODE}, or leave model_type out"
            )
        config = call.actor_config.policy_loss
        config = config if isinstance(config, EPOPolicyLossConfig) else EPOPolicyLossConfig()
        control = self._control(config)
        data, model_output = kwargs["data"], kwargs["model_output"]
        columns = data.select("response_mask", TURNS, WEIGHTS).to_padded_tensor()
        mask_B_L = columns["response_mask"].bool()
        entropy_M = _entropy(model_output, data)[mask_B_L]
        weights_M = columns[WEIGHTS][mask_B_L].to(entropy_M.dtype)
        if control.aggregate == "token":
            weights_M = torch.full_like(weights_M, 1 / max(total, 1))
        term = control.entropy_loss(
            entropy_M,
            weights_M,
            columns[TURNS][mask_B_L],
            step=self._session.step,
            total_steps=self._total_steps(config),
        )
        # The ranks' gradients are averaged by FSDP, their metrics by verl; both are meant to be summed.
        ranks = self.get_data_parallel_size()  # type: ignore[attr-defined]
        metrics |= {name: Metric(AggregationType.SUM, ranks * value) for name, value in term.metrics.items()}
        return loss + ranks * term.loss.to(loss.dtype), metrics

    def _control(self, config: EPOPolicyLossConfig) -> EntropyControl:
        if self._session.control is None:
            speaks = not dist.is_initialized() or dist.get_rank() == 0
            return self._session.start(config.make_control(), method=config.method, speaks=speaks)
        return self._session.control

    def _total_steps(self, config: EPOPolicyLossConfig) -> int:
        total = config.total_steps or self.optimizer_config.total_training_steps  # type: ignore[attr-defined]
        if total < 1:
            raise UserError(
                f"actor.optim.total_training_steps={total}: the phase weight needs the run's length; verl's trainer "
                "sets it, elsewhere give actor.policy_loss.total_steps"
            )
        return total


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class EPOEngine(EntropyTermMixin, FSDPEngineWithLMHead):
    """verl's FSDP and FSDP2 engine for language models, with the entropy term."""


def _entropy(model_output: Any, data: TensorDict) -> Tensor:
    """[B, L] nats of the response, with gradient, at least float32."""
    entropy = model_output.get("entropy")
    if entropy is None:
        raise UserError(
            "the model's output has no entropies: set actor_rollout_ref.actor.calculate_entropy=True for loss_mode=epo"
        )
    if torch.is_grad_enabled() and not entropy.requires_grad:
        raise UserError(
            "the entropies of the model's output have no gradient, so EPO would train nothing; this kernel cannot be "
            "used with loss_mode=epo: set actor_rollout_ref.model.use_fused_kernels=False"
        )
    entropy_B_L = no_padding_2_padding(entropy, data)
    return entropy_B_L if entropy_B_L.dtype == torch.float64 else entropy_B_L.float()


def _sampling_entropy(data: TensorDict, tokens: Tokens) -> Tensor:
    """[R] entropies under the policy that sampled the batch, which verl computed with the old log-probabilities."""
    if "entropy" not in data.keys():  # noqa: SIM118
        raise UserError(
            "the batch has no column entropy, from which the history is made: verl computes it with the old "
            "log-probabilities where trainer.use_v1=True and algorithm.rollout_correction.bypass_mode=False"
        )
    return data.select("entropy").to_padded_tensor()["entropy"][tokens.mask_B_L]
