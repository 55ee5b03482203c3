"""The text of single tokens, as viewers show them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from chat_templates import STYLES, style_tokenizer
from epo.agent.chat import ChatFormat


@pytest.mark.parametrize("name", STYLES)
def test_pieces_join_to_the_text_and_bytes_stand_in_hex(name: str) -> None:
    chat = ChatFormat(style_tokenizer(name))
    pieces = chat.pieces()
    assert len(pieces) == len(chat.tokenizer)
    assert pieces[chat.stop_id] == STYLES[name].stop
    text = "Go north, then\ttake the 2nd cup!\n"
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces[i] for i in ids) == text
    # A letter of two bytes that the vocabulary does not hold whole: both bytes are seen.
    ids = chat.tokenizer("é", add_special_tokens=False)["input_ids"]
    assert "".join(pieces[i] for i in ids) in ("é", "⟨C3⟩⟨A9⟩", "⟨C3 A9⟩")
    assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_of_sentencepiece_keep_the_space_in_front() -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "<0xE2>": 2, "▁go": 3, "go": 4, "▁": 5}
    raw = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    assert ChatFormat(tokenizer).pieces() == ["<unk>", "</s>", "⟨E2⟩", " go", "go", " "]
