"""The process of a vLLM engine: `python -m epo.sampling._vllm_worker SOCKET FOLDER`.

Reads one JSON message per line from the inherited socket and answers each with one. Ends, with everything it started
and with FOLDER, when the other side closes the socket or dies.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any


class Worker:
    """Answers messages. Each method is a message; its keyword arguments are the message's fields."""

    def __init__(self) -> None:
        self._vllm: Any = None
        self._llm: Any = None
        self._version = -1

    def start(self, **settings: Any) -> dict[str, Any]:
        """Make the engine, with weights that mean nothing until the first `load`."""
        self._vllm = importlib.import_module("vllm")
        self._llm = self._vllm.LLM(
            **settings,
            # What reloading forgets stays random, so that the first probe shows it, in any precision.
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            # Before temperature: the exported head already holds the training temperature.
            logprobs_mode="raw_logprobs",
            generation_config="vllm",
            disable_log_stats=True,
            trust_remote_code=False,
        )
        return {}

    def load(self, *, file: str, version: int) -> dict[str, Any]:
        """Take the weights of a safetensors file in place."""
        self._version = -1
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _read(file)})
        self._version = version
        return {}

    def forget(self) -> dict[str, Any]:
        """Drop all cached keys and values."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use and cannot be dropped")
        return {}

    def score(self, *, sequences: list[list[int]]) -> dict[str, Any]:
        """Log-probabilities of every token but the first of each sequence, given those before it."""
        asked = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True
        )
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in sequences], asked, use_tqdm=False)
        return {
            "logprobs": [
                [found[token].logprob for token, found in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
                for ids, output in zip(sequences, outputs, strict=True)
            ]
        }

    def generate(
        self,
        *,
        prompts: list[list[int]],
        seeds: list[int | None],
        temperature: float,
        max_tokens: int,
        stop_id: int,
        alternatives: int,
    ) -> dict[str, Any]:
        """One response per prompt, in order, with the log-probabilities of its tokens and of the likeliest ones."""
        asked = [
            self._vllm.SamplingParams(
                temperature=temperature,
                seed=seed,
                max_tokens=max_tokens,
                stop_token_ids=[stop_id],
                ignore_eos=True,  # the chat template's end of turn is the only end
                logprobs=alternatives,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        completions: list[dict[str, Any]] = []
        for output in outputs:
            (drawn,) = output.outputs
            ids = list(drawn.token_ids)
            completions.append(
                {
                    "ids": ids,
                    "logprobs": [found[token].logprob for token, found in zip(ids, drawn.logprobs, strict=True)],
                    "alternatives": [
                        sorted(((i, f.logprob) for i, f in found.items()), key=lambda p: -p[1])[:alternatives]
                        for found in drawn.logprobs
                    ],
                    "cached": output.num_cached_tokens or 0,
                }
            )
        return {"version": self._version, "completions": completions}


def _read(file: str) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no dictionary
            yield name, tensors.get_tensor(name)


def _listen(stream: Any, messages: SimpleQueue[dict[str, Any]], folder: str) -> None:
    try:
        for line in stream:
            messages.put(json.loads(line))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)  # this process leads its group


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    messages: SimpleQueue[dict[str, Any]] = SimpleQueue()
    # A thread of its own: the other side's end is noticed in the middle of a computation, too.
    threading.Thread(target=_listen, args=(channel.makefile("r"), messages, sys.argv[2]), daemon=True).start()
    worker = Worker()
    while True:
        message = messages.get()
        method: Callable[..., dict[str, Any]] = getattr(worker, message.pop("do"))
        try:
            answer = method(**message)
        except Exception as error:
            traceback.print_exc()  # into the engine's log
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
