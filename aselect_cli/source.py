"""Options and their help, read from the source of `aselect_hf` without importing it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")
SIMPLE = {"int": int, "float": float, "str": str, "bool": bool}
SEVERAL = ("Sequence", "list", "tuple")


@dataclass(frozen=True)
class SourceOption:
    """One option of the library.

    Args:
        type: type of its values, without `None`; `list` for several words, which the command line separates by commas.
        help: its description in the docstring.
    """

    name: str
    type: Any
    help: str

    def value(self, given: Any) -> Any:
        """The Python value of a typed value."""
        return [part.strip() for part in given.split(",")] if self.type is list else given


@cache
def package_folder() -> Path:
    """Where `aselect_hf` is installed."""
    spec = find_spec("aselect_hf")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("aselect_hf is not installed")
    return Path(spec.origin).parent


def parse(*parts: str) -> ast.Module:
    """The syntax tree of a file of the package."""
    return ast.parse(package_folder().joinpath(*parts).read_bytes())


def options_of(arguments: Iterable[ast.arg | ast.AnnAssign], docstring: str | None) -> Iterator[SourceOption]:
    """Options from a function's arguments or a dataclass's fields.

    Raises:
        ValueError: one has no entry under `Args:`, or a type that the command line cannot take.
    """
    texts = described(docstring or "")
    for each in arguments:
        name = each.arg if isinstance(each, ast.arg) else ast.unparse(each.target)
        if name not in texts:
            raise ValueError(f"option {name} has no entry under Args in its docstring")
        yield SourceOption(name, option_type(each.annotation), texts[name])


def options_of_class(name: str, *parts: str) -> tuple[SourceOption, ...]:
    """Options from the fields of a dataclass in a file of the package."""
    found = next(each for each in parse(*parts).body if isinstance(each, ast.ClassDef) and each.name == name)
    fields = [each for each in found.body if isinstance(each, ast.AnnAssign)]
    return tuple(options_of(fields, ast.get_docstring(found)))


def described(docstring: str) -> dict[str, str]:
    """The entries under `Args:` of a docstring, by name."""
    _, _, section = inspect.cleandoc(docstring).partition("Args:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break
        if entry := ENTRY.fullmatch(line):
            names = entry[1].split(", ")
            texts |= dict.fromkeys(names, entry[2])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}".strip() for name in names}
    return texts


def option_type(annotation: ast.expr | None) -> Any:
    """The type that an annotation stands for, without `None`.

    Raises:
        ValueError: the command line cannot take this type.
    """
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return option_type(left)
        case ast.Name(id=name) if name in SIMPLE:
            return SIMPLE[name]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            return Literal[ast.literal_eval(values)]
        case ast.Subscript(value=ast.Name(id=name)) if name in SEVERAL:
            return list
    text = ast.unparse(annotation) if annotation else "none"
    raise ValueError(f"the type of an option must be {', '.join(SIMPLE)}, a Literal or a Sequence of str; got {text}")
