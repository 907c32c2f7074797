"""The options of rules that the command line reads from their source are those that the library has."""

from __future__ import annotations

import dataclasses
import inspect
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer

from aselect_cli import app, rules, source
from aselect_cli.source import described, option_type, package_folder
from aselect_hf.audit import audit_timestep
from aselect_hf.compare import compare_strategies
from aselect_hf.hub import PushTarget
from aselect_hf.selection import select_timestep
from aselect_hf.selection.rule import WITH_LABELS, WITHOUT_LABELS
from aselect_hf.selection.rule_options import option_help
from aselect_hf.selection.rules import RULES
from aselect_hf.speed import benchmark_model

NEW_RULE = '''
"""A rule of somebody else."""

@rule("newest", labels="none", explanation="Takes the middle one.", num_images=8)
def select_newest(inputs, *, ratio: float = 0.5, names: Sequence[str] = NAMES, mode: Literal["a_b", "c"] | None = None):
    """Take it.

    Args:
        ratio: Where it is
            (default: 0.5).
        names, mode: Two options.
    """
'''


def without_none(kind: Any) -> Any:
    """The type in `T | None`; `list` for any sequence."""
    if get_origin(kind) is not Literal and NoneType in get_args(kind):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    return list if get_args(kind) == (str,) else kind


def test_the_rules_are_those_of_the_registry():
    found = rules.read_rules()
    assert [rule.name for rule in found] == list(RULES)
    for rule in found:
        registered = RULES[rule.name]
        assert (rule.labels, rule.explanation) == (registered.labels, registered.explanation)
        hints = get_type_hints(registered.select)
        assert [option.name for option in rule.options] == list(registered.options)
        assert {each.name: each.type for each in rule.options} == {
            name: without_none(hints[name]) for name in registered.options
        }
        assert all(option.help.endswith((".", ")")) for option in rule.options)


def test_every_option_is_once_on_the_command_line():
    options = rules.rule_options()
    assert {each.name: each.help for each in options} == option_help()
    assert {(each.name, each.type) for rule in rules.read_rules() for each in rule.options} == {
        (each.name, each.type) for each in options
    }


def test_auto_is_what_the_registry_says():
    assert rules.automatic_rules() == (WITH_LABELS, WITHOUT_LABELS)


def test_a_new_rule_is_on_the_command_line_by_its_file(tmp_path, monkeypatch):
    folder = tmp_path / "selection" / "rules"
    folder.mkdir(parents=True)
    (folder / "newest.py").write_text(NEW_RULE)
    monkeypatch.setattr(rules, "package_folder", lambda: tmp_path)
    monkeypatch.setattr(source, "package_folder", lambda: tmp_path)
    (rule,) = rules.read_rules.__wrapped__()
    assert (rule.name, rule.labels) == ("newest", "none")
    assert [(each.name, each.type, each.help) for each in rule.options] == [
        ("ratio", float, "Where it is (default: 0.5)."),
        ("names", list, "Two options."),
        ("mode", Literal["a_b", "c"], "Two options."),
    ]
    assert rule.options[1].value("a, b") == ["a", "b"]


def test_an_option_without_help_or_with_an_odd_type_is_refused():
    import ast

    (function,) = ast.parse("def f(*, x: Callable = g, y: int = 0): pass").body
    with pytest.raises(ValueError, match="option x has no entry under Args"):
        list(source.options_of(function.args.kwonlyargs, "Nothing."))
    with pytest.raises(ValueError, match=r"must be int, float, str, bool, .*; got Callable"):
        option_type(function.args.kwonlyargs[0].annotation)


def test_a_docstring_ends_with_its_section():
    assert described("One.\n\nArgs:\n    a: The first,\n        long.\n\nReturns:\n    b: No argument.") == {
        "a": "The first, long."
    }


def test_the_options_of_a_push_are_the_fields_of_its_target():
    fields = [each.name for each in dataclasses.fields(PushTarget)]
    assert [each.name for each in app.TARGET] == [name for name in fields if name != "token"]


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("select", select_timestep),
        ("audit", audit_timestep),
        ("compare", compare_strategies),
        ("benchmark", benchmark_model),
    ],
)
def test_defaults_are_those_of_the_library(command, function):
    """An option without a default of its own leaves the choice to the library."""
    library = inspect.signature(function).parameters
    names = {"methods": "strategies"}
    given = {
        each.name: each.default
        for each in typer.main.get_command(app.app).commands[command].params
        if each.default is not None and names.get(each.name, each.name) in library
    }
    expected = {name: library[names.get(name, name)].default for name in given}
    as_text = {"methods": ",", "batch_sizes": ","}
    for name in as_text.keys() & given.keys():
        expected[name] = as_text[name].join(map(str, expected[name]))
    assert {name: value for name, value in given.items() if expected[name] is not inspect.Parameter.empty} == {
        name: value for name, value in expected.items() if value is not inspect.Parameter.empty
    }
    assert package_folder().joinpath("selection").is_dir()
