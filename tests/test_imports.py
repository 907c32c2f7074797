"""What `import aselect_hf` gives, and what it costs."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys

import pytest

import aselect_hf
from benchmarks.import_cost import STATEMENTS, measure

PUBLIC = [
    "ASelectDiTBackbone",
    "ASelectDiTConfig",
    "ASelectDiTForImageClassification",
    "ASelectDiTForSemanticSegmentation",
    "ASelectDiTModel",
    "ASelectDiffusionBackbone",
    "ASelectDiffusionConfig",
    "ASelectDiffusionForImageClassification",
    "ASelectDiffusionForSemanticSegmentation",
    "ASelectDiffusionModel",
    "TimestepSelection",
    "attention_maps",
    "audit_timestep",
    "compare_strategies",
    "convert_checkpoint",
    "find_massive_channels",
    "from_diffusers",
    "high_frequency_ratio",
    "make_image_processor",
    "noise_strip",
    "pca_map",
    "push_to_hub",
    "select_timestep",
    "similarity_map",
]
HEAVY = {"datasets", "diffusers", "matplotlib", "pandas", "pydantic", "rich", "sklearn", "typer"}


def python(statement: str) -> str:
    """What a fresh process prints."""
    return subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True, text=True).stdout


def test_the_public_names():
    assert aselect_hf.__all__ == PUBLIC
    assert {*PUBLIC, *aselect_hf.ROOMS} <= set(dir(aselect_hf))
    for name in PUBLIC:
        assert getattr(aselect_hf, name).__module__.startswith("aselect_hf.")
    with pytest.raises(AttributeError, match="has no attribute 'selct_timestep'"):
        aselect_hf.selct_timestep  # noqa: B018


@pytest.mark.parametrize("name", aselect_hf.LAZY)
def test_a_lazy_name_is_what_its_module_has(name):
    module = importlib.import_module(f"aselect_hf.{aselect_hf.LAZY[name]}")
    assert getattr(aselect_hf, name) is getattr(module, name)


def test_importing_loads_nothing_that_only_some_functions_need():
    loaded = set(json.loads(python("import aselect_hf, json, sys; print(json.dumps(list(sys.modules)))")))
    assert not loaded & HEAVY
    assert [name for name in loaded if name.startswith("aselect_hf.") and "modeling" not in name] == []


def test_the_auto_classes_know_the_model_at_once():
    printed = python(
        "import aselect_hf, transformers; config = transformers.AutoConfig.for_model('aselect_dit');"
        "print(transformers.MODEL_MAPPING[type(config)].__name__)"
    )
    assert printed.strip() == "ASelectDiTModel"


@pytest.mark.slow
def test_importing_costs_at_most_a_quarter_more_than_a_vision_model():
    names = ("vision model", "package")
    seconds = measure({name: STATEMENTS[name] for name in names}, rounds=5)
    reference, package = (statistics.median(seconds[name]) for name in names)
    assert package < 1.25 * reference
