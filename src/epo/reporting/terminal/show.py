"""Trajectories in a terminal: lists of them, and one as a chat whose every token shows what it was worth.

What a model or an environment wrote goes through `epo.reporting.terminal.text`; nothing of it reaches the
terminal otherwise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import islice

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from epo.reporting.reading.stored import Record, StoredTrajectories, piece_reader
from epo.reporting.terminal.scales import Scale
from epo.reporting.terminal.text import visible, visible_lines

FOLD_AT = 4000
"""Characters of an observation, and tokens of a response, that are shown of longer ones."""
FOLD_LINES = 100
"""Lines of an observation, likewise."""

_DIM = Style(dim=True)
_TRAINED = Style(underline=True)


def has_colours(console: Console) -> bool:
    """A scale needs 256 colours; with fewer, or with NO_COLOR, marks take their place."""
    return console.is_terminal and not console.no_color and console.color_system in ("256", "truecolor")


def loss_mask(record: Record) -> list[list[bool]] | None:
    """Per turn and response token: was it trained on? None for a run that did not record it.

    A response is trained on as a whole or not at all; prompts never are.
    """
    if not any("advantages" in turn for turn in record["turns"]):
        return None
    return [[turn.get("advantages") is not None] * len(turn["response_ids"]) for turn in record["turns"]]


def is_hosted(record: Record) -> bool:
    """The responses came from a server, as text without token ids."""
    turns = record["turns"]
    return any(turn["response"] for turn in turns) and not any(turn["response_ids"] for turn in turns)


def step_table(stored: StoredTrajectories) -> Table:
    """One line per step."""
    table = _table("step", "trajectories", "success", "reward", "turns", "invalid", "entropy")
    for step in stored.steps:
        rows = stored.rows(step)
        entropies = [row["entropy"] for row in rows if row["entropy"] is not None]
        turns = sum(row["turns"] for row in rows)
        table.add_row(
            str(step),
            str(len(rows)),
            f"{statistics.fmean(row['success'] for row in rows):.2f}" if rows else "-",
            f"{statistics.fmean(row['reward'] for row in rows):+.2f}" if rows else "-",
            f"{turns / len(rows):.1f}" if rows else "-",
            f"{sum(row['invalid'] for row in rows) / turns:.1%}" if turns else "-",
            f"{statistics.fmean(entropies):.3f}" if entropies else "-",
        )
    return table


def trajectory_table(rows: Sequence[Record]) -> Table:
    """One line per trajectory."""
    table = _table("step", "row", "group")
    table.add_column("task", overflow="fold", ratio=1)
    for name in ("success", "reward", "turns", "stop", "invalid", "entropy"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(
            *(Text(str(row[name])) for name in ("step", "row", "group")),
            Text(visible(str(row["task"]))),
            "yes" if row["success"] else "no",
            f"{row['reward']:+.2f}",
            str(row["turns"]),
            Text(visible(str(row["stop_reason"]))),
            str(row["invalid"] or ""),
            "-" if row["entropy"] is None else f"{row['entropy']:.3f}",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


class TrajectoryView:
    """One trajectory as a chat.

    Args:
        vocabulary: the text of every token; None shows ids, and the text of the whole response beside them.
        scale: what tokens are coloured by.
        mask: mark the tokens that were trained on, everything else dim.
        coloured: colours and underlines; marks without.
        top: the most uncertain tokens whose alternatives are listed.
        whole: long observations and responses too.
    """

    def __init__(
        self,
        record: Record,
        *,
        vocabulary: list[str] | None,
        scale: Scale,
        mask: bool = False,
        coloured: bool = True,
        top: int = 0,
        whole: bool = False,
    ) -> None:
        self._record = record
        self._has_vocabulary = vocabulary is not None
        self._piece = piece_reader(vocabulary)
        self._scale = scale
        self._coloured = coloured
        self._top = top
        self._whole = whole
        self._wants_mask = mask
        self._mask = loss_mask(record) if mask else None
        self._is_hosted = is_hosted(record)

    def render(self) -> Iterator[RenderableType]:
        """What is printed, from top to bottom."""
        yield from self._head()
        yield from self._legend()
        for number, turn in enumerate(self._record["turns"]):
            yield from self._turn(number, turn)
        if self._top and not self._is_hosted:
            yield from self._uncertain()

    def _head(self) -> Iterator[RenderableType]:
        record = self._record
        facts = {
            "task": visible(str(record["task"])),
            "split": visible(str(record.get("split") or "")),
            "type": visible(str(record["goal"])),
            "ended by": visible(str(record["stop_reason"])),
            "success": "yes" if record["success"] else "no",
            "score": f"{record['score']:.2f}",
            "reward": f"{sum(turn['reward'] for turn in record['turns']):+.2f}",
            "group": str(record["group"]),
        }
        if record.get("trained") is not None and not self._is_hosted:
            facts["trained on"] = "yes" if record["trained"] else "no"
        if record.get("restarts"):
            facts["restarts"] = str(record["restarts"])
        yield Text("   ".join(f"{name} {value}" for name, value in facts.items() if value))
        if record.get("instruction"):
            yield Text(f"asked: {visible_lines(str(record['instruction']))}")
        if record.get("error"):
            yield Text(f"error: {visible_lines(str(record['error']))}")

    def _legend(self) -> Iterator[RenderableType]:
        if self._is_hosted:
            yield Text("as text: the server that answered tells no token ids, log-probabilities and entropies")
            return
        is_recorded = any(turn.get(self._scale.field) is not None for turn in self._record["turns"])
        if is_recorded:
            yield self._scale.legend(coloured=self._coloured)
        else:
            yield Text(f"{self._scale.title}: not recorded for this trajectory")
        if not self._has_vocabulary:
            yield Text("this run kept no vocabulary: tokens are shown by their ids")
        if self._wants_mask and self._mask is None:
            yield Text("loss mask: not recorded by this run")
        elif self._coloured:
            if self._mask is not None:
                yield Text.assemble("loss mask: ", ("trained on", _TRAINED), ", ", ("not trained on", _DIM))
        elif self._mask is not None:
            yield Text("‹token›level: a token that was trained on; the rest was not")
        else:
            yield Text("‹token›level: a token that the policy drew")

    def _turn(self, number: int, turn: Record) -> Iterator[RenderableType]:
        remarks = [
            f"reward {turn['reward']:+.2f}",
            f"score {turn['score']:.2f}",
        ]
        if turn.get("prompt_tokens") is not None:
            remarks.append(f"prompt {turn['prompt_tokens']} tokens")
        if turn.get("response_tokens") is not None:
            remarks.append(f"response {turn['response_tokens']} tokens")
        if turn.get("dropped_turns"):
            remarks.append(f"{turn['dropped_turns']} earlier turns left out")
        if not turn["is_valid"]:
            remarks.append("INVALID")
        if not turn.get("understood", True):
            remarks.append("not understood")
        yield Rule(f"turn {number + 1}: {', '.join(remarks)}", align="left", characters="─", style="none")
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold", ratio=1)
        aside = _DIM if self._mask is not None else Style()
        grid.add_row("reads", Text(self._folded(turn["observation"]), aside))
        grid.add_row("writes", Text(self._folded(turn["response"])) if self._is_hosted else self._tokens(number, turn))
        if not (self._has_vocabulary or self._is_hosted):
            grid.add_row("text", Text(self._folded(turn["response"]), aside))
        if turn["action"] != turn["response"]:
            grid.add_row("does", Text(self._folded(turn["action"]), aside))
        yield grid

    def _tokens(self, number: int, turn: Record) -> Text:
        text = Text()
        values = turn.get(self._scale.field)
        ids = turn["response_ids"]
        shown = ids if self._whole else ids[:FOLD_AT]
        for place, token in enumerate(shown):
            piece = self._piece(token)
            level = None
            if values is not None and values[place] is not None:
                level = self._scale.level(values[place])
            is_trained = None if self._mask is None else self._mask[number][place]
            if self._coloured:
                text.append(piece, self._style(level, is_trained=is_trained))
            elif is_trained is False:
                text.append(piece)
            else:
                text.append(f"‹{piece}›{'-' if level is None else level}")
            text.append("\n" * piece.count("␊"))
        if len(ids) > len(shown):
            text.append(f" … {len(ids) - len(shown)} more tokens (--whole)")
        return text

    def _style(self, level: int | None, *, is_trained: bool | None) -> Style:
        if is_trained is False:
            return _DIM
        style = Style() if level is None else self._scale.style(level)
        return style + _TRAINED if is_trained else style

    def _uncertain(self) -> Iterator[RenderableType]:
        """The tokens of the highest entropy, with what could have been drawn instead."""
        found = [
            (entropy, number, place)
            for number, turn in enumerate(self._record["turns"])
            for place, entropy in enumerate(turn["entropy"])
            if entropy is not None
        ]
        found.sort(key=lambda item: (-item[0], item[1:]))
        table = _table("turn", "token", "drawn", "entropy", "probability")
        table.add_column("most probable", overflow="fold")
        for entropy, number, place in islice(found, self._top):
            turn = self._record["turns"][number]
            alternatives = turn.get("alternatives")
            flat = [] if alternatives is None else alternatives[place]
            pairs = zip(flat[::2], flat[1::2], strict=True)
            shown = "  ".join(f"‹{self._piece(token)}› {_percent(logprob)}" for token, logprob in pairs)
            table.add_row(
                str(number + 1),
                str(place + 1),
                Text(self._piece(turn["response_ids"][place])),
                f"{entropy:.3f}",
                _percent(turn["logprobs"][place]),
                Text(shown or "not recorded"),
            )
        yield Text("\nmost uncertain tokens:")
        yield table

    def _folded(self, text: str) -> str:
        if self._whole:
            return visible_lines(text)
        head = "\n".join(text[:FOLD_AT].split("\n", FOLD_LINES)[:FOLD_LINES])
        rest = len(text) - len(head)
        return visible_lines(head) + (f"\n… {rest} more characters (--whole)" if rest else "")


def _percent(logprob: float | None) -> str:
    return "-" if logprob is None else f"{100 * math.exp(logprob):.1f} %"
