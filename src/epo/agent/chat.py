"""A tokenizer's chat template, used so that sampled tokens are never encoded again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from epo.errors import UserError

# Mark the words of a probe conversation. Letters only, so that no template escapes or trims them.
_ASSISTANT_MARK = "epoassistantmark"
_USER_MARK = "epousermark"


class ChatFormat:
    """Renders the first message as the template does, and every later one as the text *between* two responses.

    Templates differ in what they put after a response (an end token, a newline, a new header). That text is found by
    rendering a probe conversation, and appended to the tokens the model really drew. The prompt of turn t+1 therefore
    starts with the prompt and the response of turn t, token by token, whatever the tokenizer would make of their text.

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
        try:
            between = self._after_response(_USER_MARK).partition(_USER_MARK)[0]
        except TemplateError as error:
            raise UserError(
                f"the chat template of model.path={tokenizer.name_or_path!r} does not render user and assistant turns: "
                f"{' '.join(str(error).split())}"
            ) from None
        ids = self._encode(between)
        # The template knows better than eos_token, which is the end of a document in some tokenizers (Gemma, Phi).
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
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
        return self._encode(self._render([{"role": "user", "content": user}], generate=True))

    def next_message(self, user: str, *, after: Sequence[int]) -> list[int]:
        """Ids to append after the response `after`: the end of that turn if it is missing, `user`, the next header."""
        ids = self._encode(self._after_response(user))
        ended = len(after) > 0 and after[-1] == self.stop_id
        return ids[self._num_ending :] if ended else ids

    def response_ids(self, text: str) -> list[int]:
        """Ids of a response written by an expert, the end token included."""
        return [*self._encode(text), self.stop_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response for people and parsers; special tokens (the end of the turn) are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _after_response(self, user: str) -> str:
        """What the template puts between the words of a response and those of the response to `user`."""
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _ASSISTANT_MARK},
            {"role": "user", "content": user},
        ]
        text = self._render(messages, generate=True)
        _, mark, rest = text.partition(_ASSISTANT_MARK)
        if not mark:
            raise UserError(
                f"the chat template of model.path={self.tokenizer.name_or_path!r} leaves out earlier responses, so the "
                "model would not see what it did: use another chat_template.jinja"
            )
        return rest

    def _render(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
