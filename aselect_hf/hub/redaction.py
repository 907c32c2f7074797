"""Remove secrets from everything that is written, and local paths from everything that is pushed.

    without_secrets(values)  for every file and tracker
    publishable(values)      for what is pushed: a local path is reduced to its last part

Both take text, numbers, dataclasses, and dicts, lists and tuples of these, and return a copy with changed text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import PureWindowsPath
from typing import Any, TypeVar

from aselect_hf.modeling.configuration_noisy_backbone import SECRET_NAME, SECRET_WORD

HIDDEN = "***"
SECRETS = {
    r"(?<=://)[^/\s?#]*@": "",  # https://user:password@host
    r"(://[^\s?#'\"]*)[?#][^\s'\"]+": r"\1",  # what follows an address may be a signature or a key
    rf"(?i)((?:[\w-]*[_-])?{SECRET_WORD}\s*=\s*|--(?:[\w-]*[_-])?{SECRET_WORD}\s+)[^\s,;&'\"]+": rf"\1{HIDDEN}",
    r"(?i)\b(Bearer\s+)[\w.~+/=-]+": rf"\1{HIDDEN}",
    r"\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{6,}": HIDDEN,  # hf_transfer is a package
    r"\b(?:gh[opsu]_\w{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16})": HIDDEN,
}
WHOLE_PATH = re.compile(r"(?:file://)?(?:~|/(?!/)|[A-Za-z]:[/\\]|\\\\)")
LOCAL_PATH = re.compile(
    r"""(?<![^\s'"(=,;])                      # at the beginning of a word
    (?:file://)?(?:~\w*[/\\]|/(?!/)|[A-Za-z]:[/\\])
    (?:[^\s'",;()/\\]+[/\\])*([^\s'",;()/\\]+)[/\\]?""",
    re.VERBOSE,
)

Value = TypeVar("Value")


def without_secrets(value: Value) -> Value:
    """Values without passwords, tokens, signatures, and entries that are named like a secret."""
    return _changed(value, _hide)


def publishable(value: Value) -> Value:
    """`without_secrets`, with every absolute path or path in a home folder reduced to its last part."""
    return _changed(value, lambda text: _last_part(_hide(text)))


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if not SECRET_NAME.fullmatch(str(name))}
        return {name: _changed(each, change) for name, each in kept.items()}
    if isinstance(value, list | tuple):
        return type(value)(_changed(each, change) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: _changed(each, change) for name, each in fields.items()})
    return value


def _hide(text: str) -> str:
    for pattern, replacement in SECRETS.items():
        text = re.sub(pattern, replacement, text)
    return text


def _last_part(text: str) -> str:
    if WHOLE_PATH.match(text):
        return PureWindowsPath(text).name or text  # it knows both kinds of separator
    return LOCAL_PATH.sub(r"\1", text)
