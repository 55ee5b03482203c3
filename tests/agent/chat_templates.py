"""Tokenizers with chat templates in the style of well-known model families, small enough to make in a test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from epo.training.tiny import ASSISTANT, CHAT_TEMPLATE, END, USER, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class Style:
    template: str
    special: tuple[str, ...]
    eos: str
    stop: str
    """What ends a response; not always the `eos_token`."""


STYLES = {
    "tiny": Style(template=CHAT_TEMPLATE, special=(END, USER, ASSISTANT), eos=END, stop=END),
    # A default system prompt, as in Qwen2.5.
    "chatml": Style(
        template=(
            "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "{% endif %}"
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        eos="<|im_end|>",
        stop="<|im_end|>",
    ),
    # Content is trimmed.
    "llama3": Style(
        template=(
            "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
            "{{ m.content | trim }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
        ),
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|eot_id|>",
        stop="<|eot_id|>",
    ),
    # No header before a response, and roles must alternate.
    "mistral": Style(
        template=(
            "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}"
            "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}"
            "{% endfor %}"
        ),
        special=("<s>", "</s>", "[INST]", "[/INST]"),
        eos="</s>",
        stop="</s>",
    ),
    # A space stands between a response and its end token.
    "llama2": Style(
        template=(
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>"),
        eos="</s>",
        stop="</s>",
    ),
    # The end of a turn is not the tokenizer's end of sequence, and the assistant has another name.
    "gemma": Style(
        template=(
            "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
            "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        ),
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        stop="<end_of_turn>",
    ),
    # Thoughts are taken out of all turns but the last: its rendering is not append-only.
    "qwen3": Style(
        template=(
            "{% for m in messages %}{% set text = m.content %}"
            "{% if m.role == 'assistant' and '</think>' in text and not loop.last %}"
            "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
            "<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        eos="<|im_end|>",
        stop="<|im_end|>",
    ),
}

APPEND_ONLY = [name for name in STYLES if name not in ("qwen3", "llama2")]
"""Styles whose rendering of a conversation starts with the rendering of its beginning, the end token right after."""


def style_tokenizer(name: str) -> Any:
    style = STYLES[name]
    tokenizer = build_tokenizer(["open the door to the kitchen, then take the cup"] * 4, vocabulary_size=300)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in style.special])
    tokenizer.eos_token = style.eos
    tokenizer.bos_token = style.special[0]
    tokenizer.chat_template = style.template
    return tokenizer
