"""The command tree."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from aselect_cli import audit, benchmark, compare, convert, export, features, push, select, serve
from aselect_cli.command import as_command
from aselect_cli.rules import rule_options, rules_table
from aselect_cli.source import SourceOption, options_of_class

OTHER_NAMES = {
    "strategies": "methods",
    "fixed-timestep": "timestep",
    "image-column-name": "image-column",
    "label-column-name": "label-column",
}
"""Names of options in earlier versions and in the training scripts."""
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "DIFFUSERS_VERBOSITY": "error"}  # diffusers warns about every cast


def one_spelling(name: str) -> str:
    """The present name of an option or command, with dashes."""
    name = name.replace("_", "-")
    return OTHER_NAMES.get(name, name)


app = typer.Typer(
    help="Diffusion Transformers as vision backbones, at the timestep that their own features choose.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": one_spelling},
)


def add(
    module: Any,
    example: str,
    options: Iterable[SourceOption] = (),
    heading: str = "Options",
    notes: str = "",
    name: str = "",
) -> None:
    """Add the command of a module: the function `name`.

    Args:
        example: arguments of `aselect`, for the end of the help.
        options: options of the library, see `as_command`; the help lists them under `heading`.
        notes: more text for the end of the help.
        name: default: that of the module.
    """
    function = getattr(module, name or module.__name__.rpartition(".")[2])
    app.command(epilog=f"Example: aselect {example}{notes}")(as_command(function, options, heading))


RULES = (rule_options(), "Options of rules", f"\n\nRules:\n\n{rules_table()}")
TARGET = [each for each in options_of_class("PushTarget", "hub", "target.py") if each.name != "token"]

add(select, "select sample sample --output-dir runs/select --save-model runs/model", *RULES)
add(audit, "audit sample sample --output-dir runs/audit", *RULES)
add(compare, "compare sample sample --methods hfr,grid --baseline facebook/dinov2-small", *RULES)
add(features, "features sample --list")
add(convert, "convert facebook/DiT-XL-2-256 dit-xl-2-256")
add(export, "export runs/model runs/onnx --quantize")
add(push, "push runs/model me/my-dit --private --tag v1.0", TARGET)
add(serve, "app sample runs/model", name="app")
add(benchmark, "benchmark sample --batch-sizes 1,8 --output runs/benchmark.json")


def print_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        from importlib.metadata import version  # as slow to import as typer

        print(f"aselect {version('aselect-hf')}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a mistake ends in one line on stderr and exit code 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        code = app(prog_name="aselect", standalone_mode=False)
    except typer.TyperException as error:  # a mistyped option, a missing argument
        if message := error.format_message().replace("Value error, ", ""):  # empty if it printed the help
            print(f"aselect: error: {message}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
