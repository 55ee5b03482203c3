"""EPO in TRL's trainer on a small game of several turns, on a CPU: the lines marked `# EPO` are all it takes.

The game: in each turn a letter is asked for, and its share in what is said is the reward.

    python examples/trl_epo.py                         # a model made from nothing, under a minute
    python examples/trl_epo.py --model smollm2-135m    # after `epo models pull smollm2-135m`; many minutes
"""

import argparse
import random

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from epo.config import ModelConfig
from epo.integrations.trl import EPOConfig, EPOTrainer  # EPO
from epo.models.catalogue import pull
from epo.training.tiny import build_model, build_tokenizer

TURNS = 4


class Letters:
    """What TRL calls an environment: a reset, a tool, and what the episode earned."""

    def reset(self, **_: object) -> str:
        self.earned, self.letter = 0.0, random.choice("aeio")
        return f"Say {self.letter}."

    def say(self, text: str) -> str:
        """Say something.

        Args:
            text: What to say.
        """
        self.earned += text.count(self.letter) / max(1, len(text)) / TURNS
        self.letter = random.choice("aeio")
        return f"Say {self.letter}."

    def get_reward(self) -> float:
        return self.earned


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()
if options.model == "tiny":
    tokenizer = build_tokenizer(["Say a. Say e. Say i. Say o."] * 4, vocabulary_size=280)
    model = build_model(tokenizer, ModelConfig.model_validate({"max_context": 256}), seed=0)
    user, assistant, end = "<|user|>", "<|assistant|>", "<|end|>"
else:
    folder = pull(options.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    user, assistant, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
# Whatever the model says is the argument of the one tool, so it need not know how to call tools.
tokenizer.chat_template = (
    "{% for m in messages %}{{ A if m.role == 'assistant' else U }}{{ m.content }}{{ m.tool_calls | tojson if "
    "m.tool_calls }}E{% endfor %}{{ A if add_generation_prompt }}"
).translate({ord("A"): repr(assistant), ord("U"): repr(user), ord("E"): end})
call = {"type": "function", "function": {"name": "say", "arguments": {"text": "{content}"}}}
tokenizer.response_template = {
    "defaults": {"role": "assistant"},
    "start_anchor": assistant,
    "fields": {"tool_calls": {"content": "text", "repeats": True, "transform": call}},
}
config = EPOConfig(
    output_dir="trl-epo",
    epo_method="epo_strong",  # EPO
    epo_coefficient=0.001,  # EPO
    max_steps=options.steps,
    learning_rate=3e-3 if options.model == "tiny" else 1e-5,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    num_generations=8,
    max_tool_calling_iterations=TURNS,  # after the last call TRL lets the model speak once more, for nothing
    max_completion_length=160,
    generation_kwargs={"max_new_tokens": 8},
    use_cpu=True,
    bf16=False,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * 64})
trainer = EPOTrainer(model, None, config, prompts, processing_class=tokenizer, environment_factory=Letters)  # EPO
trainer.train()
