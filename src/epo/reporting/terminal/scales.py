"""What tokens are coloured by in a terminal: ranges, levels, colours.

The ranges are those of the page's viewer, and fixed: a colour means the same in every trajectory and run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rich.color import Color
from rich.style import Style
from rich.text import Text

_Rgb = tuple[int, int, int]

# matplotlib's cividis, made to look the same with every kind of colour vision (Nunez et al., 2018), at ten places.
_SEQUENTIAL: tuple[_Rgb, ...] = (
    (0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115),
    (138, 134, 120), (165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56),
)  # fmt: skip
# Blue below, orange above, as in ColorBrewer's PuOr and RdBu: the ends differ with every kind of colour vision.
_DIVERGING: tuple[_Rgb, ...] = (
    (5, 48, 97), (33, 102, 172), (67, 147, 195), (146, 197, 222), (230, 230, 230),
    (253, 184, 99), (224, 130, 20), (179, 88, 6), (127, 59, 8),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """One quantity of a token, and on which of its levels a value lies.

    There are at most ten levels: without colour a level is a digit.
    """

    field: str
    """Of a turn in the trajectory record."""
    title: str
    ends: tuple[str, str]
    """What lies at the lowest and at the highest level."""
    position: Callable[[float], float]
    """To [0, 1]; what is beyond belongs to the last level."""
    is_diverging: bool = False

    @property
    def colours(self) -> tuple[_Rgb, ...]:
        """From the lowest level to the highest."""
        return _DIVERGING if self.is_diverging else _SEQUENTIAL

    def level(self, value: float) -> int:
        """A diverging scale has a middle level, around its centre."""
        count, place = len(self.colours), min(1.0, max(0.0, self.position(value)))
        return round(place * (count - 1)) if self.is_diverging else min(count - 1, math.floor(place * count))

    def style(self, level: int) -> Style:
        """Ink and paper both, so that it reads on dark and on light terminals."""
        rgb = self.colours[level]
        ink = 0 if _luminance(rgb) > 0.179 else 255  # where black and white contrast alike
        return Style(color=Color.from_rgb(ink, ink, ink), bgcolor=Color.from_rgb(*rgb))

    def legend(self, *, coloured: bool) -> Text:
        """One line: the levels from end to end."""
        text = Text(f"{self.title}: {self.ends[0]} ")
        for level in range(len(self.colours)):
            text.append(f" {level} " if coloured else str(level), self.style(level) if coloured else "")
        return text.append(f" {self.ends[1]}")


SCALES = {
    "entropy": Scale(field="entropy", title="entropy, nats", ends=("0", "3 and more"), position=lambda x: x / 3),
    "logprob": Scale(
        field="logprobs", title="log-probability, nats", ends=("0", "-5 and less"), position=lambda x: -x / 5
    ),
    "advantage": Scale(
        field="advantages",
        title="advantage",
        ends=("-3 and less", "+3 and more"),
        position=lambda x: (x / 3 + 1) / 2,
        is_diverging=True,
    ),
    "ratio": Scale(
        field="ratios",
        title="probability ratio",
        ends=("0.5 and less", "2 and more"),
        position=lambda x: (math.log2(x) + 1) / 2 if x > 0 else 0.0,
        is_diverging=True,
    ),
}
"""By the name that `epo show --by` takes."""


def _luminance(rgb: _Rgb) -> float:
    """Relative, as WCAG 2 defines it: 0 black, 1 white."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
