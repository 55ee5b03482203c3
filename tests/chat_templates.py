"""Tokenizers with the chat templates of well-known model families, small enough to make in a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, pre_tokenizers

from epo.agent.chat import ChatFormat
from epo.training.tiny import ASSISTANT, CHAT_TEMPLATE, END, USER, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class Style:
    template: str
    special: tuple[str, ...]
    """Control tokens; the first is `bos_token`."""
    eos: str
    stop: str
    """What ends a response; not always the `eos_token`."""
    words: tuple[str, ...] = ()
    """Tokens of the vocabulary that are no control tokens."""
    lines: bool = False
    """The tokenizer keeps runs of newlines together whatever follows, as Llama 3's and Qwen's do; GPT-2's does not."""
    differs: frozenset[str] = field(default_factory=frozenset[str])
    """Kinds of `RESPONSES` after which the template's rendering of the conversation is not the transcript."""


RESPONSES = {
    "plain": "open door",
    "thoughts": "<think>north?</think><action>open door</action>",
    "padded": "\n open door \n",
}
"""What policies write; templates change some of it when they render it as an earlier turn."""


def shipped(name: str) -> str:
    return (Path(__file__).parent / "agent" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TRIMMED = frozenset({"padded"})
# The newline of the header and the one that the response begins with are one token to whoever encodes them together.
MERGED = frozenset({"padded"})
SPACED = frozenset(RESPONSES)
DATE = "26 Jul 2024"
"""What Llama 3.2's template names where it cannot ask the clock."""

STYLES = {
    "tiny": Style(template=CHAT_TEMPLATE, special=(END, USER, ASSISTANT), eos=END, stop=END),
    "chatml": Style(
        template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        special=CHATML,
        eos="<|im_end|>",
        stop="<|im_end|>",
        differs=MERGED,
    ),
    # A system prompt of its own, as in Qwen2.5.
    "smollm2": Style(
        template=(
            "{% if messages[0].role != 'system' %}<|im_start|>system\n"
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        special=CHATML,
        eos="<|im_end|>",
        stop="<|im_end|>",
        differs=MERGED,
    ),
    "qwen2_5": Style(
        template=shipped("qwen2_5"), lines=True, special=CHATML, eos="<|im_end|>", stop="<|im_end|>", differs=MERGED
    ),
    # Thoughts are taken out of all turns but the last: its rendering is not append-only.
    "qwen3": Style(
        template=shipped("qwen3"),
        lines=True,
        special=CHATML,
        eos="<|im_end|>",
        stop="<|im_end|>",
        words=("<think>", "</think>", "<tool_response>", "</tool_response>"),
        differs=MERGED | {"thoughts"},
    ),
    # Content is trimmed.
    "llama3": Style(
        template=shipped("llama3"), lines=True, special=LLAMA3, eos="<|eot_id|>", stop="<|eot_id|>", differs=TRIMMED
    ),
    # Begins with the date.
    "llama3_2": Style(
        template=shipped("llama3_2"), lines=True, special=LLAMA3, eos="<|eot_id|>", stop="<|eot_id|>", differs=TRIMMED
    ),
    # The end of a turn is not the tokenizer's end of sequence, and the assistant has another name.
    "gemma": Style(template=shipped("gemma"), special=GEMMA, eos="<eos>", stop="<end_of_turn>", differs=TRIMMED),
    "gemma3": Style(template=shipped("gemma3"), special=GEMMA, eos="<eos>", stop="<end_of_turn>", differs=TRIMMED),
    "phi3": Style(
        template=shipped("phi3"),
        special=("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        eos="<|endoftext|>",
        stop="<|end|>",
        differs=MERGED,
    ),
    # No header before a response but a space, and roles must alternate.
    "mistral": Style(
        template=(
            "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}"
            "{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
            "{% endfor %}"
        ),
        special=("<s>", "</s>"),
        eos="</s>",
        stop="</s>",
        differs=SPACED,
    ),
    # A space stands between a response and its end token, too.
    "llama2": Style(
        template=(
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>"),
        eos="</s>",
        stop="</s>",
        differs=SPACED,
    ),
}


def conversations(chat: ChatFormat, response: str) -> tuple[list[int], list[int]]:
    """Ids of a conversation of four messages with `response` between them: as a transcript, and as the template renders
    all of it anew."""
    prompt = chat.first_prompt("Go on.")
    messages = [{"role": "user", "content": "Go on."}]
    for number in range(3):
        drawn = chat.response_ids(response)
        prompt = [*prompt, *drawn, *chat.next_message(f"Door {number}.", after=drawn)]
        messages += [{"role": "assistant", "content": response}, {"role": "user", "content": f"Door {number}."}]
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=DATE)
    return prompt, chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def style_tokenizer(name: str) -> Any:
    style = STYLES[name]
    texts = ["open the door to the kitchen, then take the cup", "now\n\n open"] * 4
    tokenizer = build_tokenizer(texts, vocabulary_size=300)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in style.special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in style.words])
    if style.lines:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LINES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.eos_token = style.eos
    tokenizer.bos_token = style.special[0]
    tokenizer.chat_template = style.template
    return tokenizer
