"""A tokenizer's chat template, used so that sampled tokens are never encoded again."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

from epo.errors import UserError

# Mark the words of a probe conversation. Letters only, so that no template escapes or trims them.
_ASSISTANT_MARK = "epoassistantmark"
_USER_MARK = "epousermark"
_CONTROL_MARK = "epocontrolmark"
_THE_DAY = date(2024, 7, 26)
"""What templates that ask for today's date (Llama 3.2) are told, so that a run reads the same prompts on every day. It
is the date that Meta's templates fall back to."""


class ChatFormat:
    """Renders the first message as the template does, and every later one as the text *between* two responses.

    Templates differ in what they put after a response (an end token, a newline, a new header). That text is found by
    rendering a probe conversation, and appended to the tokens the model really drew. The prompt of turn t+1 therefore
    starts with the prompt and the response of turn t, token by token, whatever the tokenizer would make of their text.

    Only the template writes control tokens: their text inside a message (an observation that says `<|im_end|>`) is read
    as ordinary text, so an environment cannot end a turn or begin one.

    Raises:
        UserError: no chat template, or one that cannot be used turn by turn; nothing that ends a response.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer of model.path={tokenizer.name_or_path!r} has no chat template, so it is unknown how "
                "turns are marked: use an instruction-tuned model, or put a chat_template.jinja into its directory"
            )
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # Longer ones first: one may be the beginning of another.
        alternatives = sorted(special.values(), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, alternatives)) or "(?!)")
        try:
            between, mark, after = self._after_response(_USER_MARK).partition(_USER_MARK)
        except UserError:
            raise
        except Exception as error:  # a template is a program, and fails in any way that one does
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"the chat template of model.path={tokenizer.name_or_path!r} does not render user and assistant turns "
                f"({reason}): use another chat_template.jinja"
            ) from None
        if not mark or _USER_MARK in after:
            raise UserError(
                f"the chat template of model.path={tokenizer.name_or_path!r} does not render a user's message exactly "
                "once: use another chat_template.jinja"
            )
        ids = self._encode(between)
        # The template knows better than eos_token, which is the end of a document in some tokenizers (Gemma, Phi).
        stop = ids[0] if ids and ids[0] in special else tokenizer.eos_token_id
        if stop is None:
            raise UserError(
                f"the tokenizer of model.path={tokenizer.name_or_path!r} has no end-of-sequence token, so responses "
                "would never end: set eos_token in tokenizer_config.json"
            )
        self.stop_id: int = int(stop)
        """The token with which the model ends its turn."""
        # How much of the text between two turns the model writes itself when it ends its turn.
        self._num_ending = ids.index(self.stop_id) + 1 if self.stop_id in ids else 0

    def first_prompt(self, user: str) -> list[int]:
        """Ids of a conversation that opens with `user`, up to where the assistant answers."""
        return self._encode_message(lambda text: self._render([{"role": "user", "content": text}]), user)

    def next_message(self, user: str, *, after: Sequence[int]) -> list[int]:
        """Ids to append after the response `after`: the end of that turn if it is missing, `user`, the next header."""
        ids = self._encode_message(self._after_response, user)
        ended = len(after) > 0 and after[-1] == self.stop_id
        return ids[self._num_ending :] if ended else ids

    def response_ids(self, text: str) -> list[int]:
        """Ids of a response written by an expert, the end token included."""
        return [*self._encode(text), self.stop_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response for people and parsers; special tokens (the end of the turn) are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def tokens_inside(self, response_ids: Sequence[int], text: str, span: tuple[int, int]) -> tuple[int, int]:
        """First and end of the tokens that lie in `span` of `text`, which is `decode(response_ids)`, with no character
        outside of it. Nothing is encoded: the places are found by decoding beginnings of the response.

        `span` is to be enclosed by ASCII characters: a token may hold half of any other.
        """
        first, end = (self._tokens_up_to(place, response_ids, text) for place in (span[0], span[1] + 1))
        return first, max(first, end - 1)

    def _tokens_up_to(self, place: int, response_ids: Sequence[int], text: str) -> int:
        """The fewest tokens whose text has the first `place` characters of `text`."""

        def has_them(count: int) -> bool:
            return self.decode(response_ids[:count])[:place] == text[:place]

        return bisect_left(range(len(response_ids)), True, key=has_them)

    def pieces(self) -> list[str]:
        """Text of every token on its own, by id. Bytes that are no whole UTF-8 text stand in hex: `⟨E2 80⟩`."""
        ids = range(len(self.tokenizer))
        names = self.tokenizer.convert_ids_to_tokens(list(ids))
        texts = self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        return [_piece(name or "", text) for name, text in zip(names, texts, strict=True)]

    def drifts(self, response_ids: Sequence[int]) -> bool:
        """Whether encoding the text of a response, end token included, gives other ids than were drawn."""
        text = str(self.tokenizer.decode(list(response_ids), clean_up_tokenization_spaces=False))
        return self._encode(text) != list(response_ids)

    def _encode_message(self, render: Callable[[str], str], user: str) -> list[int]:
        """Ids of `render(user)`, with the text of control tokens inside `user` as ordinary text.

        Only that text is encoded apart from the rest, so the tokens at the seams of template and message stay those of
        the whole text.
        """
        found = self._control.findall(user)
        if not found:
            return self._encode(render(user))
        mark = _CONTROL_MARK
        while mark in user:
            mark += "x"
        head, *tails = render(self._control.sub(mark, user)).split(mark)
        ids = self._encode(head)
        for control, tail in zip(found, tails, strict=True):
            ids += [*self._encode(control, as_text=True), *self._encode(tail)]
        return ids

    def _after_response(self, user: str) -> str:
        """What the template puts between the words of a response and those of the response to `user`."""
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _ASSISTANT_MARK},
            {"role": "user", "content": user},
        ]
        text = self._render(messages)
        _, mark, rest = text.partition(_ASSISTANT_MARK)
        if not mark:
            raise UserError(
                f"the chat template of model.path={self.tokenizer.name_or_path!r} leaves out earlier responses, so the "
                "model would not see what it did: use another chat_template.jinja"
            )
        return rest

    def _render(self, messages: list[dict[str, str]]) -> str:
        """Up to where the assistant answers."""
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, strftime_now=_THE_DAY.strftime
        )
        return str(rendered)

    def _encode(self, text: str, *, as_text: bool = False) -> list[int]:
        """`as_text`: the text of control tokens is no control token.

        Halves of surrogate pairs, which no tokenizer takes, are read as question marks.
        """
        text = text.encode("utf-8", "replace").decode()
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)
        return [int(i) for i in encoded["input_ids"]]


def _piece(name: str, text: str) -> str:
    """The text of a token, given its name in the vocabulary and how it decodes alone."""
    if "\ufffd" in text:
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
            return f"⟨{byte[1]}⟩"
        if all(c in _BYTE_OF for c in name):
            return f"⟨{bytes(_BYTE_OF[c] for c in name).hex(' ').upper()}⟩"
    # SentencePiece drops the space in front of what it decodes alone.
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text


def _byte_names() -> dict[str, int]:
    """The letter by which byte-level BPE names each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_names()
