"""Sampling with a vLLM engine beside the learner, on the same machine.

The engine runs in a process of its own (`_vllm_engine`) and takes the learner's weights in place before the first round
after every update. It begins with random weights, so that whatever an update leaves out is seen: each update is
followed by a probe that the engine and the learner both score.

Legend: N probe tokens, D hidden size, V vocabulary, R tokens of a response.
"""

from __future__ import annotations

import json
import logging
import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from epo.config import SamplerConfig
from epo.errors import UserError
from epo.sampling._vllm_engine import Engine, EngineDied, EngineRefused, EngineStuck, require_vllm
from epo.sampling.base import Completion, Request, Sampler
from epo.training.adapters import merged_tensors
from epo.training.attention import logit_cap
from epo.training.policy import Policy
from epo.types import Alternatives, FloatArray

logger = logging.getLogger(__name__)

_BFLOAT16_SLACK = 200
"""How much wider `max_weight_error` is for the root mean square in bfloat16 than for the largest difference in float32.
Root mean squares on SmolLM2-135M: rounding 0.09 nats; one tensor left random, of 15 tried one by one, 0.31 to 5.6."""
_COLDEST = 0.01
"""vLLM replaces lower temperatures above 0 by this one."""


class VllmSampler(Sampler):
    """Draws with vLLM; entropies are unknown (NaN).

    Log-probabilities are those at training temperature, also when sampling at another: the exported output head is
    divided by the training temperature, and the engine samples at the quotient of the two.

    Args:
        policy: the learner's; a new `policy.version` is sent to the engine before the next response is drawn.
        max_episodes: live episodes at most.

    Raises:
        UserError: vLLM is missing or does not start.
    """

    def __init__(self, policy: Policy, config: SamplerConfig, *, max_episodes: int) -> None:
        require_vllm()
        if logit_cap(policy.model.config) is not None:
            raise UserError(
                f"sampler.name='vllm' takes the training temperature into the weights of the head, which the cap on "
                f"the logits of model.path={policy.model.name_or_path!r} does not allow: set sampler.name=local"
            )
        self._policy = policy
        self._config = config
        self._max_episodes = max_episodes
        self._probes = probe_sequences(policy)
        self._loaded: tuple[int, float] | None = None
        self._restarted_at: int | None = None
        self._incidents: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.weight_error = 0.0
        """Difference that the last probe found, as `config.max_weight_error` bounds it, nats."""
        self.cached_tokens = 0
        """Prompt tokens whose keys and values were found in the prefix cache."""
        self.prefilled_tokens = 0
        """Prompt tokens that were not."""
        self.decoded_tokens = 0
        """Tokens drawn since the sampler was made."""
        self.engine = self._start()

    def generate(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        train_temperature: float,
        max_tokens: int,
        alternatives: int = 0,
    ) -> list[Completion]:
        """
        Raises:
            UserError: the engine cannot use the model, died twice with the same weights, or has other weights.
        """
        if not requests:
            return []
        for request in requests:
            if len(request.prompt_ids) + max_tokens > self._policy.max_context:
                raise ValueError(
                    f"episode {request.episode}: prompt and response exceed max_context {self._policy.max_context}"
                )
        relative = temperature / train_temperature
        if 0 < relative < _COLDEST:
            raise UserError(
                f"temperature {temperature} is too close to 0 for vLLM beside a training temperature of "
                f"{train_temperature}: set it to 0, which is greedy, or to {_COLDEST * train_temperature} or more"
            )
        message = {
            "prompts": [[int(i) for i in r.prompt_ids] for r in requests],
            # Drawn once, so that a round which has to be repeated is the same round.
            "seeds": [int(r.random.integers(2**63)) if temperature else None for r in requests],
            "temperature": relative,
            "max_tokens": max_tokens,
            "stop_id": self._policy.chat.stop_id,
            "alternatives": alternatives,
        }
        while True:
            try:
                if self._loaded != (self._policy.version, train_temperature):
                    self._load(train_temperature)
                return self._completions(requests, self.engine.call("generate", **message))
            except EngineDied as death:
                self._restart(death)  # raises when this goes on
            except EngineRefused as error:
                raise UserError(
                    f"sampler.name='vllm': the engine cannot use model.path={self._policy.model.name_or_path!r} "
                    f"({error}): set sampler.name=local"
                ) from None

    def incidents(self) -> list[str]:
        found: list[str] = []
        while not self._incidents.empty():
            found.append(self._incidents.get())
        return found

    def describe(self) -> str:
        return f"vLLM in a process of its own, {str(engine_dtype(self._policy)).removeprefix('torch.')}"

    def release(self, episode: int) -> None:
        """Nothing to do: the engine's prefix cache evicts what was not used for longest."""

    def close(self) -> None:
        self.engine.close()

    def _completions(self, requests: Sequence[Request], answer: dict[str, Any]) -> list[Completion]:
        version = answer["version"]
        assert version == self._policy.version, f"drawn with version {version}, not {self._policy.version}"
        completions: list[Completion] = []
        for request, found in zip(requests, answer["completions"], strict=True):
            ids = np.array(found["ids"], dtype=np.int64)
            self.cached_tokens += found["cached"]
            self.prefilled_tokens += len(request.prompt_ids) - found["cached"]
            self.decoded_tokens += len(ids)
            completions.append(
                Completion(
                    episode=request.episode,
                    response_ids=ids,
                    logprobs=np.array(found["logprobs"], dtype=np.float32),
                    entropy=np.full(len(ids), np.nan, dtype=np.float32),
                    finished=bool(ids[-1] == self._policy.chat.stop_id),
                    policy_version=version,
                    alternatives=_alternatives(found["alternatives"]),
                )
            )
        return completions

    # ---------------------------------------------------------------- the engine

    def _start(self) -> Engine:
        is_on_cpu = self._policy.device.type == "cpu"
        return Engine(
            model_config=engine_model_config(self._policy),
            settings={
                "dtype": str(engine_dtype(self._policy)).removeprefix("torch."),
                "max_model_len": self._policy.max_context,
                "max_num_seqs": self._max_episodes,
                "block_size": self._config.block_size,
                "kv_cache_memory_bytes": int(self._config.kv_gib * 2**30),
                "enforce_eager": is_on_cpu,
            },
            # The threads of the learner, wherever the system puts them: the two never compute at the same time.
            environment={
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            }
            if is_on_cpu
            else {},
        )

    def _restart(self, death: EngineDied) -> None:
        self.engine.close()
        self._loaded = None
        if self._restarted_at == self._policy.version:
            mend = "where memory is short lower sampler.kv_gib or environment.workers"
            if isinstance(death, EngineStuck):
                mend = "where a round takes that long lower environment.workers or agent.max_response_tokens"
            raise UserError(
                f"sampler.name='vllm': the engine died a second time with the same weights ({death}): {mend}; "
                "sampler.name=local needs no engine"
            )
        incident = f"the vLLM engine died ({death}); it is started again, and draws anew for the round that it had"
        logger.warning(incident)
        self._incidents.put(incident)
        self._restarted_at = self._policy.version
        self.engine = self._start()

    # ---------------------------------------------------------------- its weights

    def _load(self, temperature: float) -> None:
        self._loaded = None
        version = self._policy.version
        file = self.engine.folder / "weights.safetensors"
        export_weights(self._policy, file, temperature=temperature)
        self.engine.call("load", file=str(file), version=version)
        file.unlink()
        self.engine.call("forget")
        self._check(temperature)
        self._loaded = (version, temperature)

    def _check(self, temperature: float) -> None:
        answer = self.engine.call("score", sequences=self._probes)
        found_N = np.concatenate([np.array(scores, dtype=np.float64) for scores in answer["logprobs"]])
        difference_N = found_N - learner_logprobs(self._policy, self._probes, temperature=temperature)
        limit = self._config.max_weight_error
        if engine_dtype(self._policy) is torch.float32:
            self.weight_error = float(np.abs(difference_N).max())
            rule = f"{self.weight_error:.3g} nats, more than sampler.max_weight_error={limit}"
        else:
            # Two correct ways to compute in bfloat16 differ by tenths of a nat at single tokens.
            self.weight_error = float(np.sqrt(np.square(difference_N).mean())) / _BFLOAT16_SLACK
            rule = (
                f"{self.weight_error * _BFLOAT16_SLACK:.3g} nats (root mean square), more than {_BFLOAT16_SLACK} times "
                f"sampler.max_weight_error={limit}"
            )
        if not self.weight_error <= limit:  # NaN, too
            raise UserError(
                f"sampler.name='vllm': after an update the engine's log-probabilities of a probe text differ from the "
                f"learner's by {rule}. Either vLLM does not take over all weights of model.path="
                f"{self._policy.model.name_or_path!r}, so set sampler.name=local; or it only rounds differently, so "
                "raise sampler.max_weight_error"
            )


def _alternatives(found_R: list[list[tuple[int, float]]]) -> Alternatives | None:
    if not found_R or not found_R[0]:
        return None
    return Alternatives(
        np.array([[token for token, _ in place] for place in found_R], dtype=np.int64),
        np.array([[logprob for _, logprob in place] for place in found_R], dtype=np.float32),
    )


def engine_dtype(policy: Policy) -> torch.dtype:
    """The engine computes everything in one type: that of the learner's matrix products."""
    stored = policy.head_weight_V_D.dtype
    return policy.compute if stored is torch.float32 else stored


def engine_model_config(policy: Policy) -> dict[str, Any]:
    """The model's `config.json` with an output head of its own.

    vLLM's CPU build copies a tied head into a packed form when it starts, and reloading leaves that copy as it was.
    """
    config = json.loads(policy.model.config.to_json_string(use_diff=False))
    return config | {"architectures": [type(policy.model).__name__], "tie_word_embeddings": False}


@torch.no_grad()
def export_weights(policy: Policy, file: Path, *, temperature: float) -> None:
    """Write all weights in the engine's type: adapters merged, the output head divided by `temperature`."""
    model: Any = policy.model
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    dtype = engine_dtype(policy)
    tensors: dict[str, Tensor] = {}
    for name, tensor in merged_tensors(model, adapter=policy.adapter):
        if name.startswith(f"{head}."):
            tensor = tensor / temperature  # a tensor of its own, also where the head is tied
        tensors[name] = tensor.to("cpu", dtype).contiguous()
    save_file(tensors, file)


def probe_sequences(policy: Policy) -> list[list[int]]:
    """Token ids to compare by: a conversation as the model knows them, and tokens from all over the vocabulary."""
    longest = min(48, policy.max_context - 1)
    random = np.random.default_rng(0)
    conversation = policy.chat.first_prompt("You are in the kitchen. You see a door, a cup and a red apple.")
    drawn = random.integers(policy.head_weight_V_D.shape[0], size=(3, longest))
    return [conversation[:longest], *drawn.tolist()]


@torch.inference_mode()
def learner_logprobs(policy: Policy, sequences: Sequence[Sequence[int]], *, temperature: float) -> FloatArray:
    """Log-probabilities [N] of every token but the first of each sequence, as the learner computes them."""
    found: list[FloatArray] = []
    for sequence in sequences:
        ids_T = torch.tensor(list(sequence), device=policy.device)
        head = policy.head(policy.hidden(ids_T[None])[0, :-1])
        logprobs_N_V = torch.log_softmax(head.logits() / temperature, dim=-1)
        found.append(logprobs_N_V.gather(1, ids_T[1:, None])[:, 0].double().cpu().numpy())
    return np.concatenate(found)
