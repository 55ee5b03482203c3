"""The model directory that both trainers of rl_step.py load: weights, and a tokenizer whose responses never end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from _rl_step_game import COLOURS, GOAL, WORDS, EndlessEnv, Scenario
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from epo.types import Task

START, END = "<|im_start|>", "<|im_end|>"
NEVER = "<|never|>"
"""The end-of-sequence token: one past the vocabulary of the model, so it is never drawn and need not be suppressed."""

# ChatML. What a tool answers is a user message, and a response that calls a tool is closed by that message, as the
# template cannot know whether the response was cut. Both trainers then read the same tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}<|im_end|>\n<|im_start|>user\n{{ message['content'] }}<|im_end|>\n"
    "{% elif message['tool_calls'] is defined and message['tool_calls'] %}"
    "<|im_start|>assistant\n{{ message['content'] }}{{ message['tool_calls'] | tojson }}"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "smollm2-shape": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
"""Models made from random numbers, by name. Any other name is a model directory."""


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Write the model directory `folder`; returns what there is to know about it."""
    folder.mkdir()
    if name in SHAPES:
        torch.manual_seed(0)
        config = LlamaConfig(
            **SHAPES[name],
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer = random_tokenizer(config.vocab_size)
    else:
        source = Path(name).expanduser()
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        for file in source.glob("*.safetensors"):
            (folder / file.name).symlink_to(file.resolve())
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer.add_special_tokens({"eos_token": NEVER, "pad_token": END})
    assert tokenizer.eos_token_id >= settings["vocab_size"], "the end token must not be one that can be drawn"
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return {key: settings[key] for key in SHAPES["tiny"]}


def row_tokens(scenario: Scenario, folder: Path) -> int:
    """Tokens of one episode, from its first prompt to its last response."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    seen = EndlessEnv(words=scenario.observation_words).reset(Task(suite="endless", id="0", split="train"))
    messages = [{"role": "user", "content": f"{seen.goal}\n{seen.text}"}]
    for _ in range(scenario.turns - 1):
        messages += [{"role": "assistant", "content": ""}, {"role": "user", "content": seen.text}]
    read = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return len(read) + scenario.turns * scenario.response_tokens


def random_tokenizer(size: int) -> Any:
    """A byte-level BPE in which every word of the game is one token, filled up to `size` entries that mean nothing."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = f"{GOAL} In the {' room now '.join(COLOURS)} {WORDS} user assistant"
    tokenizer.train_from_iterator([text, text], trainer=trainer)
    tree = json.loads(tokenizer.to_str())
    entries = tree["model"]["vocab"]
    entries.update({f"x{number}": number for number in range(len(entries), size)})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tree)))
