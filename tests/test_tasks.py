"""A task is described once: everything that differs between tasks follows from its row."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from aselect_hf import make_image_processor
from aselect_hf.conversion import head_class
from aselect_hf.hub.card import CardContent
from aselect_hf.hub.card_sections import render_card
from aselect_hf.hub.templates import handler
from aselect_hf.tasks import CLASSIFICATION, FEATURES, SEGMENTATION, TASKS, find_task, task_of_class, task_of_model
from aselect_hf.training import evaluation, metrics

PACKAGE = Path(evaluation.__file__).parents[1]
LITERALS = {name for task in TASKS.values() for name in (task.name, task.pipeline, task.head_suffix)}
LITERALS.add(FEATURES.pipeline)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_what_a_task_names_is_there(task, make_config):
    config = make_config(num_channels=3, num_labels=2)
    model = head_class(task)(config)
    assert task_of_model(model) is task_of_class(type(model).__name__) is find_task(task.name) is task
    assert getattr(model, task.head) in model.children()
    assert isinstance(getattr(transformers, task.auto_class).from_config(config), type(model))
    assert task.pipeline in transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks()
    assert make_image_processor(model.config).do_center_crop is not task.whole_image
    assert task.metric in _results_of_metrics()


def _results_of_metrics() -> set[str]:
    """Names of the values that the metrics give."""
    accuracy, iou = metrics.Accuracy(), metrics.MeanIoU(2)
    return {
        *accuracy.compute(predictions=[0], references=[0]),
        *iou.compute(predictions=[[[0]]], references=[[[0]]]),
    }


def test_a_model_without_a_head_and_a_class_of_ones_own(make_model, make_config):
    assert task_of_model(make_model()) is task_of_class("ASelectDiTBackbone") is FEATURES
    own = type("MySegmenter", (head_class(SEGMENTATION),), {})
    assert task_of_model(own(make_config(num_channels=3))) is SEGMENTATION


def test_the_handler_that_travels_knows_the_same_tasks():
    assert {task.head_suffix: task.pipeline for task in TASKS.values()} == handler.TASKS


def test_a_new_task_has_a_card(monkeypatch, make_config):
    depth = replace(
        CLASSIFICATION, name="depth", pipeline="depth-estimation", auto_class="AutoModelForDepthEstimation",
        head_suffix="ForDepthEstimation", introduction="A depth estimator on", answer="a map of depths",
    )  # fmt: skip
    monkeypatch.setitem(TASKS, depth.name, depth)
    content = CardContent(make_config(num_channels=3), "ada/dit", "ASelectDiTForDepthEstimation", 1)
    card = render_card(content)
    assert card.data.pipeline_tag == "depth-estimation"
    for text in ("A depth estimator on a Diffusion", "AutoModelForDepthEstimation.from_pretrained", "a map of depths"):
        assert text in card.text


def _files() -> list[Path]:
    """Code that must look tasks up. `modeling/` and `handler.py` travel with checkpoints, without the package."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name not in ("tasks.py", "handler.py")]
    return [path for path in files if not {"modeling", "sample"} & set(path.relative_to(PACKAGE).parts)]


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_file_tells_tasks_apart_by_name(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.arg):
            assert node.arg != "segmentation", f"{path.name}:{node.lineno} encodes a task as a bool"
        if isinstance(node, ast.Compare):
            compared = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            assert not compared & LITERALS, f"{path.name}:{node.lineno} compares the name of a task"


def test_the_tasks_import_nothing_heavy():
    """Read as a file: the package around it registers models, which needs torch."""
    code = (
        "import importlib.util, json, sys; "
        f"spec = importlib.util.spec_from_file_location('tasks', {str(PACKAGE / 'tasks.py')!r}); "
        "module = importlib.util.module_from_spec(spec); sys.modules['tasks'] = module; "
        "spec.loader.exec_module(module); print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(json.loads(done.stdout))
