"""Which tokens are the thought and which the action, against a walk over every beginning of the response."""

from __future__ import annotations

from itertools import pairwise, takewhile

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from chat_templates import STYLES, style_tokenizer
from epo.agent.chat import ChatFormat
from epo.agent.parsing import find_parts

TEXTS = (
    "<think>north? the é of 北京 …</think><action>open door</action>",
    "<think></think><action></action>",
    " \n<think> two\nlines. I'm 'sure' n't !</think>\n<action> go <b>east</b> </action>\n",
    "<think>日本</think>and then<action>é</action> more <action>not this</action>",
)


def walked(chat: ChatFormat, ids: list[int], text: str, span: tuple[int, int]) -> list[int]:
    """Tokens whose characters are all inside, by the length of what each beginning has of the text."""
    beginnings = [chat.decode(ids[:count]) for count in range(len(ids) + 1)]
    ends = [sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(said, text, strict=False))) for said in beginnings]
    return [place for place, (start, end) in enumerate(pairwise(ends)) if span[0] <= start and end <= span[1]]


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_the_parts_are_those_that_lie_inside_the_tags(name: str, text: str) -> None:
    chat = ChatFormat(style_tokenizer(name))
    whole = chat.response_ids(text)
    in_pieces = [i for letter in text for i in chat.response_ids(letter)[:-1]] + [chat.stop_id]  # another tokenisation
    for ids in (whole, whole[:-1], in_pieces):
        said = chat.decode(ids)
        for span in find_parts(said):
            assert span is not None
            first, end = chat.tokens_inside(ids, said, span)
            assert list(range(first, end)) == walked(chat, ids, said, span)
            if ids is in_pieces:
                assert chat.decode(ids[first:end]) == said[slice(*span)]


def test_tokens_that_hold_a_piece_of_a_tag_belong_to_no_part() -> None:
    """Byte by byte, with words that run over the tags, as SentencePiece makes them."""
    pieces = [
        "▁<think",
        ">go",
        "▁",
        "<0xE5>",
        "<0x8C>",
        "<0x97>",
        "▁now",
        "!<",
        "/think>",
        "<action",
        ">",
        "up",
        "</action>",
    ]
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "</s>", *pieces])}
    raw = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    chat = ChatFormat(tokenizer)
    ids = [*range(2, 2 + len(pieces)), chat.stop_id]
    said = chat.decode(ids)
    assert said == "<think>go 北 now!</think><action>up</action>"
    thought, action = find_parts(said)
    assert thought is not None and action is not None
    assert chat.tokens_inside(ids, said, thought) == (2, 7)  # neither ">go" nor "!<"
    assert chat.tokens_inside(ids, said, action) == (11, 12)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think>a</think><action>b</action>", ("a", "b")),
        ("<think>a</think>", ("a", None)),
        ("<think>a", (None, None)),
        ("a<action>b</action>", (None, "b")),
        ("<think>a<think>c</think><action>b<action></action>", ("c", "")),
        ("<action><think>x</think>", ("x", None)),
        ("", (None, None)),
    ],
)
def test_parts_of_a_text(text: str, found: tuple[str | None, str | None]) -> None:
    assert tuple(span and text[slice(*span)] for span in find_parts(text)) == found


def test_few_beginnings_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that grows with the logarithm of the response: it is asked for at every turn."""
    chat = ChatFormat(style_tokenizer(next(iter(STYLES))))
    rng = np.random.default_rng(0)
    text = "<think>" + " ".join(rng.choice(["red", "door", "é"], size=1000)) + "</think><action>go</action>"
    ids = chat.response_ids(text)
    calls = []
    decode = chat.decode
    monkeypatch.setattr(chat, "decode", lambda ids: calls.append(1) or decode(ids))
    for span in find_parts(text):
        assert span is not None
        chat.tokens_inside(ids, text, span)
    assert len(ids) > 1000 and len(calls) <= 4 * (1 + len(ids).bit_length())
