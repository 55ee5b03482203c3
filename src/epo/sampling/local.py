"""Sampling with the learner's own model in this process, keeping each episode's keys and values across turns.

Sampler and learner share weights, code and precision, so their log-probabilities agree to rounding (1e-5 in fp32).

Legend: S slots, B rows of this forward, Q new tokens, L cached length, H key-value heads, E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from epo.sampling.base import Completion, Request, Sampler
from epo.training.policy import Policy


class _SlotLayer(CacheLayerMixin):
    """Keys and values of all slots of one layer. Rows of a forward write at their own positions."""

    def __init__(self, view: _View) -> None:
        super().__init__()
        self._view = view

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _, H, _, E = key_states.shape
        view = self._view
        # Zeros, not empty: a masked NaN would still poison the attention output.
        self.keys = key_states.new_zeros(view.num_slots, H, view.length, E)
        self.values = value_states.new_zeros(view.num_slots, H, view.length, E)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        view = self._view
        self.keys[view.slots_B_1, :, view.positions_B_Q] = key_states.transpose(1, 2)
        self.values[view.slots_B_1, :, view.positions_B_Q] = value_states.transpose(1, 2)
        if view.is_prefix:
            rows = slice(0, len(view.slots_B_1))
            return self.keys[rows, :, : view.used], self.values[rows, :, : view.used]
        slots_B = view.slots_B_1[:, 0]
        return self.keys[slots_B, :, : view.used], self.values[slots_B, :, : view.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._view.used, 0

    def get_seq_length(self) -> int:
        return self._view.used

    def get_max_length(self) -> int:
        return self._view.length


@dataclass(slots=True)
class _View:
    """Which slots and positions the current forward is about. Shared by all layers."""

    num_slots: int
    length: int
    slots_B_1: Tensor = field(default_factory=lambda: torch.empty(0, 1, dtype=torch.long))
    positions_B_Q: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    used: int = 0
    is_prefix: bool = False


class LocalSampler(Sampler):
    """Decodes with the policy itself.

    Args:
        policy: shared with the learner; a new `policy.version` drops every cache.
        max_episodes: live episodes at most.
        prefill_tokens: new tokens, padding included, that one prefill forward may hold.
    """

    def __init__(self, policy: Policy, *, max_episodes: int, prefill_tokens: int = 4096) -> None:
        self._policy = policy
        self._prefill_tokens = prefill_tokens
        # Padded queries of a ragged prefill write behind their row's end, at positions that later tokens overwrite
        # before any mask shows them; the spare position takes those that would fall off the end.
        self._length = policy.max_context + 1
        self._view = _View(num_slots=max_episodes, length=self._length)
        layers: list[Any] = [_SlotLayer(self._view) for _ in range(policy.model.config.num_hidden_layers)]
        self._cache = Cache(layers=layers)
        self._cached: dict[int, list[int]] = {}
        self._slot_of: dict[int, int] = {}
        self._free = list(range(max_episodes))[::-1]
        self._version = policy.version
        self.prefilled_tokens = 0
        """Tokens that went through a prefill since the sampler was made."""
        self.decoded_tokens = 0
        """Tokens drawn since the sampler was made."""

    def release(self, episode: int) -> None:
        slot = self._slot_of.pop(episode, None)
        if slot is not None:
            self._free.append(slot)
            self._free.sort(reverse=True)
            del self._cached[episode]

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], *, temperature: float, train_temperature: float, max_tokens: int
    ) -> list[Completion]:
        if not requests:
            return []
        self._drop_stale()
        for request in requests:
            if len(request.prompt_ids) + max_tokens > self._policy.max_context:
                raise ValueError(
                    f"episode {request.episode}: prompt and response exceed max_context {self._policy.max_context}"
                )
            self._admit(request.episode)
        drawn = {r.episode: _Drawn() for r in requests}
        live = sorted(requests, key=lambda r: self._slot_of[r.episode])
        hidden_B_D = self._prefill(live)
        for remaining in range(max_tokens - 1, -1, -1):
            tokens_B = self._draw(live, hidden_B_D, drawn, temperature=temperature, train_temperature=train_temperature)
            keep = [i for i, token in enumerate(tokens_B) if token != self._policy.chat.stop_id]
            for i, token in enumerate(tokens_B):
                drawn[live[i].episode].finished = token == self._policy.chat.stop_id
            live = [live[i] for i in keep]
            if not live or not remaining:
                break
            hidden_B_D = self._forward_one(live, [tokens_B[i] for i in keep])
        self.decoded_tokens += sum(len(d.ids) for d in drawn.values())
        return [drawn[r.episode].completion(r.episode, version=self._version) for r in requests]

    def _drop_stale(self) -> None:
        if self._version != self._policy.version:
            self._version = self._policy.version
            for ids in self._cached.values():
                ids.clear()

    def _admit(self, episode: int) -> None:
        if episode not in self._slot_of:
            if not self._free:
                raise ValueError(f"more than {self._view.num_slots} live episodes: release finished ones")
            self._slot_of[episode] = self._free.pop()
            self._cached[episode] = []

    def _prefill(self, live: Sequence[Request]) -> Tensor:
        """Run what is new of each prompt; returns the hidden state [B, D] after its last token."""
        starts: list[int] = []
        for request in live:
            cached = self._cached[request.episode]
            # At least one token is run again, to have the hidden state that predicts the response.
            limit = min(len(cached), len(request.prompt_ids) - 1)
            common = 0
            while common < limit and cached[common] == request.prompt_ids[common]:
                common += 1
            starts.append(common)
        order = sorted(range(len(live)), key=lambda i: len(live[i].prompt_ids) - starts[i])
        hidden: dict[int, Tensor] = {}
        for chunk in self._chunks(order, [len(r.prompt_ids) - s for r, s in zip(live, starts, strict=True)]):
            chunk.sort(key=lambda i: self._slot_of[live[i].episode])
            new = [list(live[i].prompt_ids[starts[i] :]) for i in chunk]
            lengths = [len(ids) for ids in new]
            width = max(lengths)
            ids_B_Q = torch.tensor([ids + [0] * (width - len(ids)) for ids in new])
            out_B_Q_D = self._forward([live[i] for i in chunk], ids_B_Q, [starts[i] for i in chunk])
            last_B_D = out_B_Q_D[torch.arange(len(chunk)), torch.tensor(lengths) - 1]
            hidden.update(zip(chunk, last_B_D, strict=True))
            self.prefilled_tokens += sum(lengths)
        for request in live:
            self._cached[request.episode] = list(request.prompt_ids)
        return torch.stack([hidden[i] for i in range(len(live))])

    def _chunks(self, order: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
        """Split rows, sorted by size, so that rows times the longest stays within the budget."""
        chunks: list[list[int]] = []
        for i in order:
            if chunks and (len(chunks[-1]) + 1) * sizes[i] <= self._prefill_tokens:
                chunks[-1].append(i)
            else:
                chunks.append([i])
        return chunks

    def _forward_one(self, live: Sequence[Request], tokens_B: Sequence[int]) -> Tensor:
        starts = [len(self._cached[r.episode]) for r in live]
        for request, token in zip(live, tokens_B, strict=True):
            self._cached[request.episode].append(token)
        return self._forward(live, torch.tensor(tokens_B)[:, None], starts)[:, 0]

    def _forward(self, live: Sequence[Request], ids_B_Q: Tensor, starts: Sequence[int]) -> Tensor:
        device = self._policy.device
        width = ids_B_Q.shape[1]
        view = self._view
        slots = [self._slot_of[r.episode] for r in live]
        positions_B_Q = (torch.tensor(starts)[:, None] + torch.arange(width)).clamp_(max=self._length - 1)
        view.slots_B_1 = torch.tensor(slots, device=device)[:, None]
        view.positions_B_Q = positions_B_Q.to(device)
        view.used = int(positions_B_Q.max()) + 1
        view.is_prefix = slots == list(range(len(slots)))
        mask_B_1_Q_L = torch.arange(view.used, device=device) <= view.positions_B_Q[:, None, :, None]
        with self._policy.autocast():
            out = self._policy.trunk(
                input_ids=ids_B_Q.to(device),
                attention_mask=mask_B_1_Q_L,
                position_ids=view.positions_B_Q,
                past_key_values=self._cache,
                use_cache=True,
            )
        return out.last_hidden_state

    def _draw(
        self,
        live: Sequence[Request],
        hidden_B_D: Tensor,
        drawn: dict[int, _Drawn],
        *,
        temperature: float,
        train_temperature: float,
    ) -> list[int]:
        policy = self._policy
        # In fp32 whatever the model's precision is, as the learner's head computes it.
        head = policy.head(hidden_B_D)
        bias_V = None if head.bias_V is None else head.bias_V.float()
        logits_B_V = torch.nn.functional.linear(head.hidden_N_D.float(), head.weight_V_D.float(), bias_V)
        logprobs_B_V = torch.log_softmax(logits_B_V / train_temperature, dim=-1)
        entropy_B = -(logprobs_B_V.exp() * logprobs_B_V).sum(-1)
        if temperature == 0:
            tokens_B = logits_B_V.argmax(-1)
        else:
            tokens_B = _inverse_transform(logits_B_V / temperature, [r.random.random() for r in live])
        chosen_B = logprobs_B_V.gather(1, tokens_B[:, None])[:, 0]
        tokens = tokens_B.tolist()
        for request, token, logprob, entropy in zip(live, tokens, chosen_B.tolist(), entropy_B.tolist(), strict=True):
            drawn[request.episode].add(token, logprob, entropy)
        return tokens


def _inverse_transform(logits_B_V: Tensor, uniform_B: Sequence[float]) -> Tensor:
    """Draw from softmax(logits) with given uniform numbers, so that every row keeps its own random stream."""
    cumulative_B_V = torch.softmax(logits_B_V.double(), dim=-1).cumsum(-1)
    threshold_B_1 = torch.tensor(uniform_B, dtype=torch.float64, device=logits_B_V.device)[:, None]
    tokens_B = torch.searchsorted(cumulative_B_V, threshold_B_1 * cumulative_B_V[:, -1:], right=True)[:, 0]
    return tokens_B.clamp_(max=logits_B_V.shape[-1] - 1)


@dataclass(slots=True)
class _Drawn:
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    entropy: list[float] = field(default_factory=list[float])
    finished: bool = False

    def add(self, token: int, logprob: float, entropy: float) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.entropy.append(entropy)

    def completion(self, episode: int, *, version: int) -> Completion:
        return Completion(
            episode=episode,
            response_ids=np.array(self.ids, dtype=np.int64),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            entropy=np.array(self.entropy, dtype=np.float32),
            finished=self.finished,
            policy_version=version,
        )
