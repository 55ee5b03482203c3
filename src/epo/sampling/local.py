"""Sampling with the learner's own weights in this process, keeping each episode's keys and values across turns.

Sampler and learner share weights and precision, so their log-probabilities agree to rounding (docs/sampling.md).

Legend: B rows of this forward, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from epo.sampling.base import Completion, Request, Sampler
from epo.sampling.draw import draw_and_score
from epo.sampling.forward import Forward, Row
from epo.sampling.generic import GenericForward
from epo.sampling.lean import LeanForward, NotLean
from epo.training.policy import Policy
from epo.types import Alternatives, FloatArray, IntArray


class LocalSampler(Sampler):
    """Decodes with the policy itself.

    Models of the Llama family on a CPU go through a forward of our own, everything else through transformers' modules:
    `path` says which, and `path_reason` why it is not the former.

    Args:
        policy: shared with the learner; a new `policy.version` drops every cache.
        max_episodes: live episodes at most.
        prefill_tokens: new tokens, padding included, that one prefill forward may hold.
        lean: False computes with transformers' modules whatever the model is.
    """

    def __init__(self, policy: Policy, *, max_episodes: int, prefill_tokens: int = 4096, lean: bool = True) -> None:
        self._policy = policy
        self._max_episodes = max_episodes
        self._prefill_tokens = prefill_tokens
        self._lean = lean
        self._cached: dict[int, list[int]] = {}
        self._slot_of: dict[int, int] = {}
        self._free = list(range(max_episodes))[::-1]
        self._version = policy.version
        self.path_reason = ""
        """Why `path` is generic: what of the model the lean forward does not know, or does not compute alike."""
        self._forward = self._make_forward()
        self.prefilled_tokens = 0
        """Tokens that went through a prefill since the sampler was made."""
        self.decoded_tokens = 0
        """Tokens drawn since the sampler was made."""
        self.prefill_seconds = 0.0
        """Spent in prefills since the sampler was made."""
        self.decode_seconds = 0.0
        """Spent in logits, draws and the forwards of single tokens since the sampler was made."""
        self.pack_seconds = 0.0
        """Spent in laying out new weights since the sampler was made."""

    def describe(self) -> str:
        how = "a forward of our own" if self.path == "lean" else f"transformers' modules ({self.path_reason})"
        return f"local, {how}"

    @property
    def path(self) -> str:
        """`lean` or `generic`."""
        return self._forward.name

    def _make_forward(self) -> Forward:
        self.path_reason = ""
        if self._lean:
            try:
                return LeanForward(self._policy, num_slots=self._max_episodes)
            except NotLean as reason:
                self.path_reason = str(reason)
        else:
            self.path_reason = "asked for"
        return GenericForward(self._policy, num_slots=self._max_episodes)

    def release(self, episode: int) -> None:
        slot = self._slot_of.pop(episode, None)
        if slot is not None:
            self._free.append(slot)
            self._free.sort(reverse=True)
            del self._cached[episode]
        if not self._slot_of:
            self._forward.clear()

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        train_temperature: float,
        max_tokens: int,
        alternatives: int = 0,
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
        start = time.perf_counter()
        hidden_B_D = self._prefill(live)
        after_prefill = time.perf_counter()
        self.prefill_seconds += after_prefill - start
        for remaining in range(max_tokens - 1, -1, -1):
            tokens_B = self._draw(
                live,
                hidden_B_D,
                drawn,
                temperature=temperature,
                train_temperature=train_temperature,
                alternatives=alternatives,
            )
            keep = [i for i, token in enumerate(tokens_B) if token != self._policy.chat.stop_id]
            for i, token in enumerate(tokens_B):
                drawn[live[i].episode].finished = token == self._policy.chat.stop_id
            live = [live[i] for i in keep]
            if not live or not remaining:
                break
            hidden_B_D = self._decode(live, [tokens_B[i] for i in keep])
        self.decode_seconds += time.perf_counter() - after_prefill
        self.decoded_tokens += sum(len(d.ids) for d in drawn.values())
        return [drawn[r.episode].completion(r.episode, version=self._version) for r in requests]

    def _drop_stale(self) -> None:
        if self._version != self._policy.version:
            self._version = self._policy.version
            for ids in self._cached.values():
                ids.clear()
            start = time.perf_counter()
            if self._lean:
                del self._forward  # old and new packed weights need not exist at once
                self._forward = self._make_forward()
            self.pack_seconds += time.perf_counter() - start

    def _admit(self, episode: int) -> None:
        if episode not in self._slot_of:
            if not self._free:
                raise ValueError(f"more than {self._max_episodes} live episodes: release finished ones")
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
            rows = [Row(self._slot_of[live[i].episode], starts[i], live[i].prompt_ids[starts[i] :]) for i in chunk]
            hidden.update(zip(chunk, self._forward.hidden(rows), strict=True))
            self.prefilled_tokens += sum(len(row.token_ids) for row in rows)
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

    def _decode(self, live: Sequence[Request], tokens_B: Sequence[int]) -> Tensor:
        rows: list[Row] = []
        for request, token in zip(live, tokens_B, strict=True):
            cached = self._cached[request.episode]
            rows.append(Row(self._slot_of[request.episode], len(cached), [token]))
            cached.append(token)
        return self._forward.hidden(rows)

    def _draw(
        self,
        live: Sequence[Request],
        hidden_B_D: Tensor,
        drawn: dict[int, _Drawn],
        *,
        temperature: float,
        train_temperature: float,
        alternatives: int,
    ) -> list[int]:
        out = draw_and_score(
            self._forward.logits(hidden_B_D),
            uniform=None if temperature == 0 else [request.random.random() for request in live],
            temperature=temperature,
            train_temperature=train_temperature,
            alternatives=alternatives,
        )
        for request, token, logprob, entropy in zip(live, out.tokens, out.logprobs, out.entropy, strict=True):
            drawn[request.episode].add(token, logprob, entropy)
        if out.alternatives is not None:
            for request, ids_M, logprobs_M in zip(live, *out.alternatives, strict=True):
                drawn[request.episode].alternatives.append((ids_M, logprobs_M))
        return out.tokens


@dataclass(slots=True)
class _Drawn:
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    entropy: list[float] = field(default_factory=list[float])
    alternatives: list[tuple[IntArray, FloatArray]] = field(default_factory=list[tuple[IntArray, FloatArray]])
    finished: bool = False

    def add(self, token: int, logprob: float, entropy: float) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.entropy.append(entropy)

    def completion(self, episode: int, *, version: int) -> Completion:
        found = [np.stack(part) for part in zip(*self.alternatives, strict=True)]
        return Completion(
            episode=episode,
            response_ids=np.array(self.ids, dtype=np.int64),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            entropy=np.array(self.entropy, dtype=np.float32),
            finished=self.finished,
            policy_version=version,
            alternatives=Alternatives(*found) if found else None,
        )
