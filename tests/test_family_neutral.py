"""No file outside of modeling and conversion knows a family of networks: neither its classes nor its fields."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from aselect_hf import ASelectDiTConfig
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig

ROOT = Path(__file__).parents[1]
FAMILIES_LIVE_IN = ("aselect_hf/modeling/", "aselect_hf/conversion/", "aselect_hf/sample/", "aselect_hf/__init__.py")
FIELDS = {name for name in ASelectDiTConfig.__annotations__ if not hasattr(NoisyBackboneConfig, name)}
PARTS = {"condition_embeddings", "patch_embedding", "position_embedding", "final_layer"}
ALLOWED = {
    "aselect_hf/training/pretrain.py": {"ASelectDiTConfig", "ASelectDiTModel"},  # builds one from scratch
    "aselect_hf/compare/baselines.py": {"patch_size"},  # of plain vision transformers
    "aselect_cli/convert.py": {"num_attention_heads", "num_condition_classes"},  # what a .pt file does not say
}


def names_in(tree: ast.AST) -> Iterator[str]:
    """Every name, attribute, import and string of a file; of strings only those that are a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_fields_of_a_dit_are_told_from_those_of_all_families() -> None:
    assert {"hidden_size", "patch_size", "num_condition_classes", "learned_sigma", "per_block_conditioning"} <= FIELDS
    assert not {"num_hidden_layers", "num_channels", "sample_size", "feature", "timestep"} & FIELDS


def test_only_modeling_and_conversion_know_a_family() -> None:
    found = {}
    for path in sorted([*ROOT.glob("aselect_hf/**/*.py"), *ROOT.glob("aselect_cli/**/*.py")]):
        file = path.relative_to(ROOT).as_posix()
        if file.startswith(FAMILIES_LIVE_IN):
            continue
        names = set(names_in(ast.parse(path.read_text())))
        known = names & (FIELDS | PARTS) | {name for name in names if re.fullmatch(r"ASelectDiT\w*", name)}
        if leaked := known - ALLOWED.get(file, set()):
            found[file] = leaked
    assert not found
