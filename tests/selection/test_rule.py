"""A rule is one file: everything that names rules or their options reads the registry."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields, make_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import aselect_hf
from aselect_hf import select_timestep
from aselect_hf.audit import audit_timestep
from aselect_hf.compare.run import check_strategies, compare_strategies
from aselect_hf.data.image_data import ImageData
from aselect_hf.hub.upload import prepare_upload
from aselect_hf.selection import RULES, rules
from aselect_hf.selection.request import check_request
from aselect_hf.selection.rule import rule
from aselect_hf.selection.rule_options import option_sentences, rule_option_fields
from aselect_hf.selection.rule_table import rule_table, rules_page
from benchmarks.selection.rules_page import PAGE

NEW_FILE = '''
"""How far apart images are."""

from __future__ import annotations

import numpy as np

from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.selection.rule import Criterion, rule
from aselect_hf.selection.scoring import select_without_labels


def spread(features: np.ndarray) -> float:
    return float(features.std(axis=0).mean())


@rule(
    "spread",
    labels="none",
    explanation="Takes the timestep whose features differ most between images.",
    num_images=128,
    criterion=Criterion(spread, "images", "mean deviation"),
)
def select_spread(inputs: SelectionInputs, *, pool_size: int = 1, salt: float | None = None) -> TimestepSelection:
    """Score each candidate by the mean deviation of its channels.

    Args:
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
        salt: A pinch of it,
            or two (default: None).
    """
    return select_without_labels(inputs, "spread", pool_size=pool_size)
'''
RUN = {"timesteps": [0, 300, 900], "progress": False}


@pytest.fixture
def spread(tmp_path, monkeypatch):
    """The registry with the rule of a new file."""
    (tmp_path / "spread.py").write_text(NEW_FILE)
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    importlib.import_module("aselect_hf.selection.rules.spread")
    yield RULES["spread"]
    del RULES["spread"], sys.modules["aselect_hf.selection.rules.spread"]


@pytest.fixture
def images(normal) -> ImageData:
    labels = np.arange(30) % 2
    return ImageData(0.3 * normal(30, 2, 8, 8) + torch.from_numpy(labels - 0.5).float().view(-1, 1, 1, 1), labels)


class TestANewRule:
    def test_selects(self, spread, model, images):
        selection = select_timestep(model, images, method="spread", salt=0.5, pool_size=2, **RUN)
        assert (selection.method, selection.score_name) == ("spread", "mean deviation")
        assert len(selection.scores) == len(selection.standard_errors) == len(selection.perturbed_timesteps) == 3
        assert select_timestep(model, images, method="shortlist", first="spread", **RUN).options["first"] == "spread"

    def test_is_named_where_requests_are_refused(self, spread):
        with pytest.raises(ValueError, match=r"accepted are auto, .*, spread$"):
            check_request("sprad")
        with pytest.raises(ValueError, match=r"no option salt; .*; salt is an option of spread$"):
            check_request("hfr", ["salt"])
        with pytest.raises(ValueError, match="no option cutoff; accepted are pool_size, salt; cutoff is an option of"):
            check_strategies(["spread"], {"spread": {"cutoff": 0.2}})
        with pytest.raises(ValueError, match=r"not those of 'spread'; give a feature by name"):
            check_request("spread", feature="auto")

    def test_is_compared_and_audited(self, spread, model, images, tmp_path):
        splits = {name: images for name in ("train", "validation", "test")}
        run = RUN | {"cache_dir": tmp_path / "cache"}
        options = {"spread": {"salt": 0.1}}
        comparison = compare_strategies(
            model, splits, strategies=["spread", "fixed"], num_seeds=1, strategy_options=options, **run
        )
        assert [row.strategy for row in comparison.rows] == ["spread", "fixed"]
        assert comparison.audit.method == "spread"
        audit = audit_timestep(model, ImageData(images.items), method="spread", pool_size=2, salt=0.1, **run)
        assert (audit.method, audit.checked_by) == ("spread", "consensus")
        assert audit.picked.options == {"pool_size": 2}

    def test_is_explained(self, spread, make_model, normal, tmp_path):
        model = make_model(num_channels=3)
        selection = select_timestep(model, normal(6, 3, 8, 8).clamp(-1, 1), method="spread", **RUN)
        selection.apply(model).save_pretrained(tmp_path / "model")
        card = prepare_upload(tmp_path / "model", "ada/dit", selection=selection).card
        assert "features differ most between images. No labels were used." in card.text
        assert "| `spread` | no | 128 | 1 | Takes the timestep whose features differ most" in rule_table()
        assert "## spread\n\n- `pool_size`: Average" in rules_page()

    def test_has_arguments_in_training(self, spread):
        options = make_dataclass("Options", rule_option_fields(without=["task"]))
        found = {field.name: field for field in fields(options)}
        assert (found["salt"].type, found["salt"].default) == (float | None, None)
        assert found["salt"].metadata["help"] == "spread: A pinch of it, or two (default: None)."
        assert ", spread: Average tokens over" in found["pool_size"].metadata["help"]
        assert "task" not in found

    def test_cannot_take_the_name_of_another(self, spread):
        with pytest.raises(ValueError, match=r"rule .spread. of .*test_rule exists already in aselect_hf\.selection"):
            rule("spread", labels="none", explanation="", num_images=1)(lambda inputs: None)


def test_one_new_file_and_nothing_else(tmp_path):
    """A copy of the package with that file in its folder, asked in a process of its own."""
    package, copy = Path(aselect_hf.__file__).parent, tmp_path / "aselect_hf"
    for folder in (".", "selection", "selection/rules"):
        (copy / folder).mkdir()
        for path in (package / folder).iterdir():
            if path.name not in ("selection", "rules", "__pycache__"):
                (copy / folder / path.name).symlink_to(path)
    (copy / "selection" / "rules" / "spread.py").write_text(NEW_FILE)
    code = """
import json
from aselect_cli.rules import read_rules
from aselect_hf import select_timestep
from aselect_hf.selection import rule_table
from aselect_hf.training.arguments import TaskModelArguments
from benchmarks.selection.rules import MEASURED
given = TaskModelArguments(method="spread", salt=0.5)
known = ["spread" in MEASURED, "spread" in [rule.name for rule in read_rules()]]
print(json.dumps([rule_table.__file__, known, select_timestep.__doc__, given.rule_options]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(package.parent)])}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    file, known, doc, options = json.loads(ran.stdout.splitlines()[-1])
    assert file == str(copy / "selection" / "rule_table.py")
    assert known == [True, True], "the benchmark and the command line know it"
    assert '\n        - `"spread"` (no labels): Takes the timestep whose features differ most' in doc
    assert options == {"salt": 0.5}


def test_the_page_of_rules_is_the_registrys():
    assert PAGE.read_text() == rules_page(), "run `python -m benchmarks.selection.rules_page`"


def test_the_docstring_lists_the_rules():
    assert [name for name in RULES if f'- `"{name}"` (' not in select_timestep.__doc__] == []


@pytest.mark.parametrize("name", RULES)
def test_a_rule_can_be_read_without_importing_it(name):
    """Its name, labels and explanation are literals, and its options are described: the command line reads source."""
    found = RULES[name]
    tree = ast.parse(Path(inspect.getfile(found.select)).read_text())
    (function,) = (node for node in tree.body if getattr(node, "name", None) == found.select.__name__)
    (call,) = function.decorator_list
    assert call.func.id == "rule"
    assert ast.literal_eval(call.args[0]) == name
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for field in ("labels", "explanation", "num_images"):
        assert ast.literal_eval(given[field]) == getattr(found, field)
    assert found.explanation.endswith(".")
    for option, sentence in option_sentences(found).items():
        assert sentence.endswith(".")
        assert "(default: " in sentence
        assert found.options[option].default is not inspect.Parameter.empty


def test_an_option_that_is_not_described_is_named(monkeypatch):
    monkeypatch.setattr(RULES["grid"].select, "__doc__", "Do.\n\nArgs:\n    task: What to tell (default: None).\n")
    with pytest.raises(ValueError, match="rule 'grid' does not describe its option probe under 'Args:'"):
        option_sentences(RULES["grid"])


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("knn", {"neighbours": 3}, {"neighbors": 3}),
        ("gate", {"num_visited": 3, "learning_rate": 0.1}, {"num_visited_timesteps": 3, "gate_learning_rate": 0.1}),
    ],
)
def test_former_names_of_options_are_understood(model, images, method, old, new):
    more = {"num_epochs": 1} if method == "gate" else {}
    former, present = (select_timestep(model, images, method=method, **RUN, **more, **given) for given in (old, new))
    assert former.options == present.options
    assert former.options.items() >= new.items()
    assert former.scores == present.scores
    name = next(iter(old))
    with pytest.raises(ValueError, match=f"{name} is the former name of {next(iter(new))}: give one of the two"):
        select_timestep(model, images, method=method, **RUN, **old, **new)
    with pytest.raises(ValueError, match=f"no option {name}; .*; {name} is an option of {method}"):
        select_timestep(model, images, method="hfr", **{name: 1})
