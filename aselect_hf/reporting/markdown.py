"""Markdown with text from elsewhere in it: names of classes, data sets, metrics and files show as they are.

    Markdown("| {} | [{}](https://...) |").format(name, title)

What is formatted, added or joined into a `Markdown` is escaped, unless it is `Markdown` itself. A Jinja environment
with `finalize=Markdown.escape` treats everything that a template inserts in the same way.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}  # a comment or tag stays one where its bracket has a backslash
PUNCTUATION = re.compile(r"[\\`*\[\]|#~$&<>]|(?<![^\W_])_|_(?![^\W_])")  # within a word, _ is but a character
PLAIN_CODE = re.compile(r"[^`|<>]+")
BREAKS = ("Cc", "Cs", "Zl", "Zp")  # controls, half a character (which no file can hold), separators of lines


class Markdown(Markup):
    """A string of Markdown, as `markupsafe.Markup` is one of HTML."""

    __slots__ = ()

    @classmethod
    def escape(cls, text: Any, /) -> Markdown:
        """Any object's text on one line, with nothing in it that Markdown or HTML would read as markup."""
        if isinstance(text, Markdown):
            return text
        return cls(PUNCTUATION.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), one_line(text)))


def one_line(text: Any) -> str:
    """Text with a space for every line break and control character."""
    return "".join(" " if unicodedata.category(c) in BREAKS else c for c in str(text))


def code(text: Any) -> Markdown:
    """Text in backticks, or escaped where it would end them or the table cell around them."""
    line = one_line(text).strip()
    return Markdown(f"`{line}`") if PLAIN_CODE.fullmatch(line) else Markdown.escape(line)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """A table of rows with the same columns, every cell escaped."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    text = [Markdown("| {} |").format(Markdown(" | ").join(map(Markdown.escape, line))) for line in lines]
    return Markdown("\n").join([text[0], Markdown("|" + "---|" * len(rows[0])), *text[1:]])
