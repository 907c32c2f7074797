"""Argument dataclasses, and their values from the command line or a file."""

from __future__ import annotations

import os
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from aselect_hf.files import as_path


class Accepted(NamedTuple):
    """Annotation of an argument: a test for its values, and the accepted values in words."""

    test: Callable[[Any], bool]
    words: str


LocalPath = Annotated[str, Path]
"""May name a file or folder: a leading `~` becomes the home folder, even if a file gives the argument."""


def one_of(*values: str) -> Accepted:
    return Accepted(values.__contains__, f"one of {', '.join(values)}")


def argument(default: Any, help: str, other_names: Sequence[str] = (), repr: bool = True) -> Any:
    """A field of an argument dataclass, with `other_names` as aliases."""
    spellings = [f"--{text}" for name in other_names for text in dict.fromkeys((name, name.replace("_", "-")))]
    return field(default=default, repr=repr, metadata={"help": help, "aliases": spellings})


class Arguments:
    """Base of the argument dataclasses. A value out of range is a `ValueError` that names its argument."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            for mark in _marks(hint):
                value = getattr(self, name)
                if mark is Path and value:
                    setattr(self, name, os.path.expanduser(value))
                if isinstance(mark, Accepted) and value is not None and not mark.test(value):
                    raise ValueError(f"{name} must be {mark.words}; got {value!r}")


def _marks(hint: Any) -> list[Any]:
    """Metadata of an annotation, or of the type inside an optional one."""
    return [mark for each in (hint, *get_args(hint)) for mark in getattr(each, "__metadata__", ())]


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults unless they are `None`, and keeps the layout of the description."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse_arguments(
    dataclasses: Sequence[Any], description: str | None, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Instances of argument dataclasses from the command line.

    A first argument that ends in .yaml, .yml or .json is a file of `name: value` lines; flags after it override it.

    Args:
        dataclasses: such as `(ModelArguments, DataArguments, TrainingArguments)`.
        description: the script's docstring, which `--help` shows first.
        argv: arguments to parse (default: those of the command line).

    Raises:
        ValueError: the file cannot be read or names an unknown argument, or a value is out of range.
    """
    parser = HfArgumentParser(
        list(dataclasses), description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = _flags_of_file(as_path(argv[0]), dataclasses) + argv[1:]
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def _flags_of_file(path: Path, dataclasses: Sequence[Any]) -> list[str]:
    """The file as flags, so that argparse reads both sources alike."""
    try:
        values = yaml.safe_load(path.read_bytes())  # in any Unicode encoding
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config file {path} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold 'name: value' lines")
    types = _types_by_name(dataclasses)
    flags = []
    for given, value in values.items():
        name = str(given).replace("-", "_")
        if name not in types:
            hint = "".join(f"; did you mean {close}?" for close in get_close_matches(name, types, 1))
            raise ValueError(f"config file {path}: unknown argument {given!r}{hint}")
        if isinstance(value, bool) and types[name] is not bool:
            value = "yes" if value else "no"  # YAML reads `mixed_precision: no` as false
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def _types_by_name(dataclasses: Sequence[Any]) -> dict[str, Any]:
    types = {name: hint for kind in dataclasses for name, hint in get_type_hints(kind).items()}
    for kind in dataclasses:
        for each in fields(kind):
            aliases = [alias.removeprefix("--") for alias in each.metadata.get("aliases", ())]
            types |= dict.fromkeys(aliases, types[each.name])
    return types
