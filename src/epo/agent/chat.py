"""A tokenizer's chat template, used so that sampled tokens are never encoded again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epo.errors import UserError

# Marks the assistant's words in a probe conversation. Letters only, so that no template escapes or trims it.
_MARK = "epoassistantmark"


class ChatFormat:
    """Renders the first message as the template does, and every later one as the text *between* two responses.

    Templates differ in what they put after a response (an end token, a newline, a new header). That text is found once,
    by rendering a probe conversation, and appended to the tokens the model really drew. The prompt of turn t+1 therefore
    starts with the prompt and the response of turn t, token by token, whatever the tokenizer would make of their text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer of model.path={tokenizer.name_or_path!r} has no chat template, so it is unknown how turns are "
                "marked: use an instruction-tuned model, or put a chat_template.jinja into the model directory"
            )
        stop = tokenizer.eos_token_id
        if stop is None:
            raise UserError(
                f"the tokenizer of model.path={tokenizer.name_or_path!r} has no end-of-sequence token, so responses would "
                "never end: set eos_token in tokenizer_config.json"
            )
        self.stop_id: int = int(stop)
        """The token with which the model ends its turn."""

    def first_prompt(self, user: str) -> list[int]:
        """Ids of a conversation that opens with `user`, up to where the assistant answers."""
        return self._encode(self._render([{"role": "user", "content": user}], generate=True))

    def next_message(self, user: str, *, after: Sequence[int]) -> list[int]:
        """Ids to append after the response `after`: the end of that turn if it is missing, `user`, the next header."""
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _MARK},
            {"role": "user", "content": user},
        ]
        _, _, rest = self._render(messages, generate=True).partition(_MARK)
        ids = self._encode(rest)
        ended = bool(after) and after[-1] == self.stop_id
        return ids[1:] if ended and ids and ids[0] == self.stop_id else ids

    def response_ids(self, text: str) -> list[int]:
        """Ids of a response written by an expert, the end token included."""
        return [*self._encode(text), self.stop_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response for people and parsers; special tokens (the end of the turn) are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _render(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
