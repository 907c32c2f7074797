"""Every code block of the documentation: its names and options exist; `make test-docs` runs all that can be run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import typer

from aselect_cli.app import app
from tests.docs.snippets import PAGES, ROOT, SNIPPETS, Snippet, read_snippets

PYTHON = [snippet for snippet in SNIPPETS if snippet.language == "python"]
BASH = [snippet for snippet in SNIPPETS if snippet.language == "bash"]
RUNNABLE = [page for page in PAGES if any(snippet.reason is None for snippet in read_snippets(page))]


@pytest.mark.parametrize("snippet", PYTHON, ids=lambda snippet: snippet.name)
def test_imported_names_exist(snippet: Snippet) -> None:
    for node in ast.walk(ast.parse(snippet.code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("aselect_hf"):
            module = import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "aselect_hf":
            assert hasattr(import_module("aselect_hf"), node.attr), f"aselect_hf.{node.attr} does not exist"


@pytest.mark.parametrize("snippet", BASH, ids=lambda snippet: snippet.name)
def test_options_of_commands_exist(snippet: Snippet) -> None:
    for words in snippet.commands():
        if words[0] == "aselect" and not words[1].startswith("-"):
            command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
            command.make_context(words[1], words[2:])
        elif training := [word for word in words if word.startswith("aselect_hf.training.")]:
            known = options_of(import_module(training[0]))
            given = {word[2:].partition("=")[0] for word in words[words.index(training[0]) :] if word.startswith("--")}
            assert given - known - {"help"} == set()


def options_of(script: ModuleType) -> set[str]:
    """Fields of all argument classes that a training script imports."""
    classes = [each for name, each in vars(script).items() if name.endswith("Arguments")]
    classes += [each for name, each in vars(import_module("aselect_hf.training.arguments")).items() if "Arg" in name]
    return {field.name for each in classes if hasattr(each, "__dataclass_fields__") for field in fields(each)}


@pytest.mark.docs
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_a_page_can_be_followed(page: Path, tmp_path: Path) -> None:
    """Run the blocks of a page in order, in one folder; Python blocks share their names."""
    python: list[str] = []
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    for snippet in read_snippets(page):
        if snippet.reason is not None:
            continue
        if snippet.language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", snippet.code]
        else:
            python.append(snippet.code)
            command = [sys.executable, "-c", "\n".join(python)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{snippet.name}: {done.stderr[-2000:]}"
