"""Help, version, completion and mistyped options answer at once, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

import aselect_hf
from aselect_cli.app import one_spelling
from benchmarks.import_cost import cpu_seconds

RUN = "import sys; from aselect_cli.app import main; sys.argv = ['aselect', *{arguments!r}]; "
WITH_MODULES = RUN + "\ntry: main()\nfinally: print('loaded:', *sys.modules, file=sys.stderr)"
INSTANT = {
    "help": (["--help"], 0, "Usage: aselect"),
    "no arguments": ([], 2, "Usage: aselect"),
    "help of a command": (["select", "--help"], 0, "--num-views"),
    "version": (["--version"], 0, "aselect 0."),
    "a mistyped option": (
        ["select", "--metod", "hfr"],
        2,
        "aselect: error: No such option: --metod (Possible options: --method",
    ),
    "a mistyped command": (["selct"], 2, "aselect: error: No such command 'selct'. Did you mean 'select'?"),
    "a missing argument": (["push", "runs/model"], 2, "aselect: error: Missing argument"),
    "a wrong choice": (
        ["convert", "a", "b", "--to", "onnx"],
        2,
        "aselect: error: Invalid value for '--to': 'onnx' is not",
    ),
}


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; the names of all modules that it loaded end its stderr."""
    code = WITH_MODULES.format(arguments=arguments)
    variables = os.environ | {"COLUMNS": "120"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)


def loaded(done: subprocess.CompletedProcess[str]) -> set[str]:
    return set(done.stderr.rpartition("loaded: ")[2].split())


@pytest.mark.parametrize(("arguments", "code", "text"), INSTANT.values(), ids=INSTANT)
def test_it_answers_without_torch(arguments, code, text):
    done = run(arguments)
    assert (done.returncode, text in done.stdout + done.stderr) == (code, True)
    assert not loaded(done) & {"aselect_hf", "torch", "transformers", "numpy"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("aselect sel", "select"),
        ("aselect select sample sample --num-vi", "--num-views"),
        ("aselect select sample sample --method ret", "retrieval"),
        ("aselect compare sample sample --methods hfr,ret", "hfr,retrieval"),
        ("aselect convert a b --to dif", "diffusers"),
    ],
)
def test_the_shell_completes_without_torch(words, found):
    done = run([], _ASELECT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
    assert found in done.stdout.split()
    assert not loaded(done) & {"aselect_hf", "torch", "transformers", "numpy"}


def test_it_costs_little_more_than_the_libraries_that_print_help():
    """Twice plus a quarter of a second leaves room for other load; torch alone takes ten times as long."""
    libraries = min(cpu_seconds("import typer, rich.markdown") for _ in range(3))
    for arguments in (["--help"], ["--version"]):
        statement = RUN.format(arguments=arguments) + "main()"
        assert min(cpu_seconds(statement) for _ in range(3)) < 2 * libraries + 0.25


def test_the_version_is_that_of_the_package(aselect):
    code, stdout, _ = aselect("--version")
    assert (code, stdout) == (0, f"aselect {aselect_hf.__version__}\n")
    assert version("aselect-hf") == aselect_hf.__version__


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "aselect_hf", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"aselect {aselect_hf.__version__}\n"


def test_one_spelling():
    assert one_spelling("batch_sizes") == one_spelling("batch-sizes") == "batch-sizes"
    assert one_spelling("strategies") == "methods"
    assert one_spelling("fixed_timestep") == "timestep"
