"""How a function becomes a command: `--json`, the library's own options, and mistakes that end in one line."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from aselect_cli.source import SourceOption

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document; everything else goes to stderr.")]


@dataclass(frozen=True)
class Answer:
    """The result of a command: a text for people, and a document for programs."""

    text: str
    document: dict[str, Any]
    exit_code: int = 0

    @classmethod
    def silent(cls, exit_code: int = 0) -> Answer:
        """Of a process that shared the work and leaves files and messages to the first one."""
        return cls("", {}, exit_code)


def as_command(
    function: Callable[..., Answer], options: Iterable[SourceOption] = (), panel: str | None = None
) -> Callable[..., None]:
    """Make a function a command of typer, with an option `--json`.

    Args:
        function: what to run; it prints only messages.
        options: options of the library. The function gets those that were given as the dictionary `options`. An option
            that is a parameter of the function is left out.
        panel: heading of these options in the help.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [each for each in signature.parameters.values() if each.name != "options"]
    read = {each.name: each for each in options if each.name not in signature.parameters}

    def run(**arguments: Any) -> None:
        from aselect_hf.errors import one_line_errors

        as_json = arguments.pop("json")
        if "options" in signature.parameters:
            given = {name: arguments.pop(name) for name in read}
            arguments["options"] = {name: read[name].value(value) for name, value in given.items() if value is not None}
        speaks = int(os.environ.get("RANK", 0)) == 0  # of several processes, the first speaks for all
        with one_line_errors("aselect"), open(os.devnull, "w") as nowhere:
            messages = nowhere if not speaks else sys.stderr if as_json else sys.stdout
            with contextlib.redirect_stdout(messages):
                answer = function(**arguments)
        if speaks:
            print(json.dumps(answer.document, indent=1) if as_json else answer.text)
        raise typer.Exit(answer.exit_code)

    switch = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    parameters = [each.replace(kind=each.KEYWORD_ONLY) for each in own]
    parameters += [*(_parameter(each, panel) for each in read.values()), switch]
    run.__name__, run.__module__ = function.__name__, function.__module__
    run.__doc__ = _plain(inspect.getdoc(function) or "")
    run.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _plain(text: str) -> str:
    """Text for a terminal, which shows no markup and wraps lines itself."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.replace("`", "").split("\n\n"))


def _parameter(option: SourceOption, panel: str | None) -> inspect.Parameter:
    kind = str if option.type is list else option.type
    metavar = "NAME,NAME,..." if option.type is list else None
    info = typer.Option(help=_plain(option.help), rich_help_panel=panel, metavar=metavar)
    annotation = Annotated[kind | None, info]  # type: ignore[valid-type]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def command_line() -> str:
    """The command that is running, for a report."""
    return shlex.join(["aselect", *sys.argv[1:]])
