"""The process in which TRL's `GRPOTrainer` takes RL steps for rl_step.py, in its environment mode."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)
from transformers.utils import logging

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from _rl_step_game import Clock, EndlessEnv, Scenario, answer, peak_bytes, wait_for_call
from trl import GRPOConfig, GRPOTrainer

from epo.types import Task

# The whole response is the call of one tool, so that the episode goes on whatever the model says. This is the public
# way of telling a tokenizer how responses are parsed; TRL uses it in place of its own templates when it is set.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "content": "text",
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "act", "arguments": {"action": "{content}"}}},
        },
    },
}


def environment_factory(words: int) -> Callable[[], Any]:
    class ToolEnvironment:
        """The game as TRL wants it: a reset, a tool, and what the episode earned."""

        def __init__(self) -> None:
            self._game = EndlessEnv(words=words)
            self._earned = 0.0

        def reset(self, *, number: int, **_: Any) -> str:
            self._earned = 0.0
            seen = self._game.reset(Task(suite="endless", id=str(number), split="train"))
            return f"{seen.goal}\n{seen.text}"

        def act(self, action: str) -> str:
            """Do something in the house.

            Args:
                action: What to do.

            Returns:
                What is seen next.
            """
            step = self._game.step(action)
            self._earned += step.reward
            return step.observation.text

        def get_reward(self) -> float:
            return self._earned

    return ToolEnvironment


class Meter:
    """Counts and times the forward passes of the model's trunk, and what else tells where the time goes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.reset()
        self._start = 0.0
        model.base_model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.base_model.register_forward_hook(self._after, with_kwargs=True)

    def reset(self) -> None:
        self.tokens = {"prefill": 0, "decode": 0, "update": 0}
        self.passes = {"prefill": 0, "decode": 0, "update": 0}
        self.seconds = {"prefill": 0.0, "decode": 0.0, "update_forward": 0.0, "generate": 0.0}
        self.head = 0
        self.work: dict[str, int] = {}

    def _kind(self, kwargs: dict[str, Any]) -> str:
        if torch.is_grad_enabled():
            return "update"
        return "decode" if kwargs["input_ids"].shape[1] == 1 else "prefill"

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kind = self._kind(kwargs)
        self.tokens[kind] += kwargs["input_ids"].numel()
        self.passes[kind] += 1
        self._start = time.perf_counter()

    def _after(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kind = self._kind(kwargs)
        self.seconds["update_forward" if kind == "update" else kind] += time.perf_counter() - self._start
        if kind == "update":
            # Without Triton TRL's head is given every position but the last, whatever the labels.
            self.head += kwargs["input_ids"].numel() - kwargs["input_ids"].shape[0]


class MeasuredTrainer(GRPOTrainer):
    """Does what its parent does and notes when."""

    clock: Clock
    meter: Meter

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.clock.mark()
        completion, tool = output["completion_mask"], output["tool_mask"]
        self.meter.work = {
            "episodes": len(completion),
            "turns": int(((completion * tool).diff(dim=1, prepend=torch.zeros(len(tool), 1)) == 1).sum()),
            "sampled": int((completion * tool).sum()),
            "row_tokens": int(output["prompt_mask"].sum() + completion.sum()),
            "trained": int((completion * tool).sum()),
        }
        return output

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = super()._generate_single_turn(*args, **kwargs)
        self.meter.seconds["generate"] += time.perf_counter() - start
        return output


class Served(TrainerCallback):
    """An RL step begins when it is asked for, and is answered with what it took."""

    def __init__(self, clock: Clock, meter: Meter) -> None:
        self.clock, self.meter = clock, meter
        self.done = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        answer({})

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        wait_for_call()
        self.meter.reset()
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.mark()
        meter = self.meter
        steps, self.done = state.global_step - self.done, state.global_step
        answer(
            {
                **self.clock.between(),
                "work": meter.work | {"optimizer_steps": steps},
                "cost": {
                    "prefilled": meter.tokens["prefill"],
                    "decode_passes": meter.passes["decode"],
                    "updated": meter.tokens["update"],
                    "head": meter.head,
                    "update_passes": meter.passes["update"],
                },
                "seconds": meter.seconds,
                "peak_bytes": peak_bytes(),
            }
        )


def work(folder: Path, *, attention: str = "sdpa", generation: dict[str, Any] | None = None, **options: Any) -> None:
    """Serve `GRPOTrainer.train`, one optimiser step at a time.

    Args:
        attention: kernels of transformers.
        generation: more of TRL's `generation_kwargs`.
        options: more of `GRPOConfig`.
    """
    logging.set_verbosity_error()
    scenario = Scenario.load(folder)
    torch.set_num_threads(scenario.threads)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True, trust_remote_code=False)
    tokenizer.response_template = RESPONSE_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        local_files_only=True,
        trust_remote_code=False,
        dtype=torch.float32,
        attn_implementation=attention,
    )
    clock, meter = Clock(), Meter(model)
    config = GRPOConfig(
        output_dir=str(folder / "trl-run"),
        use_cpu=True,
        bf16=scenario.compute == "bfloat16",
        max_steps=10_000,
        learning_rate=scenario.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=scenario.rows_per_pass,
        gradient_accumulation_steps=scenario.episodes // scenario.rows_per_pass,
        num_generations=scenario.group,
        max_tool_calling_iterations=scenario.turns - 1,
        max_completion_length=scenario.max_context,  # of all turns and observations of an episode together
        generation_kwargs={"max_new_tokens": scenario.response_tokens, **(generation or {})},
        temperature=1.0,
        beta=0.0,
        entropy_coef=0.0,
        loss_type="dapo",  # every token of the step equally, like epo's aggregate=token
        dataloader_pin_memory=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **{"gradient_checkpointing": False, **options},  # on by default
    )
    trainer = MeasuredTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": ""}], "number": number} for number in range(64)]
        ),
        environment_factory=environment_factory(scenario.observation_words),
        callbacks=[Served(clock, meter)],
    )
    trainer.clock, trainer.meter = clock, meter
    trainer.train()
