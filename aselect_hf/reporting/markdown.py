"""Markdown that escapes inserted text, so that names of classes, data sets, metrics and files show unchanged.

    Markdown("| {} | [{}](https://...) |").format(name, title)

Everything that is formatted, added or joined into a `Markdown` is escaped, unless it is a `Markdown` itself. A Jinja
environment with `finalize=Markdown.escape` escapes everything that a template inserts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}  # a backslash before the bracket would not stop a comment or tag
PUNCTUATION = re.compile(r"[\\`*\[\]|#~$&<>]|(?<![^\W_])_|_(?![^\W_])")  # _ within a word is no markup
PLAIN_CODE = re.compile(r"[^`|<>]+")
BREAKS = ("Cc", "Cs", "Zl", "Zp")  # controls, surrogates (which no file can hold), line and paragraph separators


class Markdown(Markup):
    """A string of Markdown; the counterpart of `markupsafe.Markup` for HTML."""

    __slots__ = ()

    @classmethod
    def escape(cls, text: Any, /) -> Markdown:
        """The text of any object on one line, escaped so that neither Markdown nor HTML reads it as markup."""
        if isinstance(text, Markdown):
            return text
        return cls(PUNCTUATION.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), one_line(text)))


def one_line(text: Any) -> str:
    """Text in which a space replaces every line break and control character."""
    return "".join(" " if unicodedata.category(c) in BREAKS else c for c in str(text))


def code(text: Any) -> Markdown:
    """Text in backticks, or escaped if it would end the backticks or the table cell around them."""
    line = one_line(text).strip()
    return Markdown(f"`{line}`") if PLAIN_CODE.fullmatch(line) else Markdown.escape(line)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """A table of rows with the same columns, every cell escaped."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    text = [Markdown("| {} |").format(Markdown(" | ").join(map(Markdown.escape, line))) for line in lines]
    return Markdown("\n").join([text[0], Markdown("|" + "---|" * len(rows[0])), *text[1:]])
