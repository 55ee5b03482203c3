"""Markdown pages as data: their blocks of code, the command lines and settings they name, their links and anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"^(?P<fence>```+)(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=fence)\s*$", re.DOTALL | re.MULTILINE
)
INDENTED = re.compile(r"(?:(?<=\n\n)|^)(?:(?: {4}|\t)[^\n]*\n(?:[ \t]*\n(?= {4}|\t))*)+", re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
NOT_RUN = re.compile(r"<!--\s*not run:\s*(\S.*?)\s*-->\s*\Z")
EPO = re.compile(r"(?<![\w./=-])(?:[\w./-]+/)?epo(?=\s+(?:[a-z]+|--[a-z]+)(?:\s|$))")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code."""

    language: str
    code: str
    line: int
    """Of the page, at which the code begins, from 1."""
    not_run: str | None = None
    """Why it cannot be run, from a comment `<!-- not run: reason -->` above it."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page of the documentation."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path=path, text=path.read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else self.path.name

    def fenced(self) -> Iterator[Block]:
        """Blocks between fences."""
        for match in FENCE.finditer(self.text):
            reason = NOT_RUN.search(self.text[: match.start()])
            yield Block(
                language=match["language"],
                code=match["code"],
                line=self.text.count("\n", 0, match.start("code")) + 1,
                not_run=reason[1] if reason else None,
            )

    @property
    def prose(self) -> str:
        """The text without what stands between fences, line for line."""
        return FENCE.sub(lambda match: "\n" * match[0].count("\n"), self.text)

    def shell_lines(self) -> Iterator[tuple[int, str]]:
        """Lines of blocks that may be commands, with their numbers; continued lines are joined."""
        blocks = [(b.line, b.code) for b in self.fenced() if b.language in ("", "bash", "sh", "console")]
        prose = self.prose
        blocks += [(prose.count("\n", 0, m.start()) + 1, m[0]) for m in INDENTED.finditer(prose)]
        for start, code in sorted(blocks):
            lines = code.splitlines()
            while lines:
                number = start + len(code.splitlines()) - len(lines)
                line = lines.pop(0)
                while line.endswith("\\") and lines:
                    line = line[:-1] + lines.pop(0)
                yield number, line

    def spans(self) -> Iterator[tuple[int, str]]:
        """Code within the text, with the number of its line."""
        prose = self.prose
        for match in SPAN.finditer(INDENTED.sub(lambda m: "\n" * m[0].count("\n"), prose)):
            yield prose.count("\n", 0, match.start()) + 1, match[1]

    def links(self) -> Iterator[tuple[int, str]]:
        prose = SPAN.sub(lambda match: "`" * len(match[0]), self.prose)
        for match in LINK.finditer(prose):
            yield prose.count("\n", 0, match.start()) + 1, match[1]

    def anchors(self) -> set[str]:
        """Of the headings, as code forges and the site make them."""
        found: set[str] = set()
        for heading in HEADING.findall(self.prose):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            again = (f"{slug}-{number}" for number in range(1, 99))
            found.add(slug if slug not in found else next(other for other in again if other not in found))
        return found


def epo_commands(line: str) -> Iterator[list[str]]:
    """The arguments of every `epo ...` in a line of a shell or a span."""
    line = re.sub(r"\s#\s.*", "", line)
    for match in EPO.finditer(line):
        rest = line[match.end() :]
        try:
            lexer = shlex.shlex(rest, posix=True, punctuation_chars="&;<>()")
            lexer.whitespace_split = True
            lexer.commenters = "#"
            tokens = list(lexer)
        except ValueError:  # a quote that is no quote: output rather than a command
            tokens = rest.split()
        for position, token in enumerate(tokens):
            if re.fullmatch(r"[&;<>()|]+", token):
                tokens = tokens[:position]
                break
        yield tokens


def pages() -> list[Page]:
    """README, the pages beside it, and everything in docs/."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [Page.read(path) for path in paths]
