"""The code blocks of the documentation, and why some of them are not run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
LANGUAGES = ("python", "bash")


@dataclass(frozen=True)
class Snippet:
    """A code block.

    Args:
        page, line: where it is; lines count from 1.
        reason: why it is not run, from a comment `<!-- not run: reason -->` before it.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def read_snippets(page: Path) -> list[Snippet]:
    """All Python and bash blocks of a page."""
    found: list[Snippet] = []
    reason = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block" and (match := NOT_RUN.match(token.content.strip())):
            reason = match[1]
        elif token.type == "fence" and token.info in LANGUAGES:
            assert token.map is not None
            found.append(Snippet(page, token.map[0] + 1, token.info, token.content, reason))
            reason = None
        elif token.level == 0 and token.nesting >= 0:
            reason = None
    return found


SNIPPETS = [snippet for page in PAGES for snippet in read_snippets(page)]
