"""Names of features: resolution, defaults, errors, folding onto the grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aselect_hf.modeling.features import FEATURE_KINDS, default_feature, list_features, parse_feature, tokens_to_map

KINDS = {"hidden", "query", "key", "value", "attention", "attention_gated", "mlp", "mlp_gated"}


def test_the_documented_kinds_exist() -> None:
    assert set(FEATURE_KINDS) == KINDS | {"attention_norm", "mlp_norm"}


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("blocks.0.query", 0, "query"),
        ("blocks.11.hidden", 11, "hidden"),
        ("blocks.-1.hidden", 11, "hidden"),
        ("blocks.-12.mlp_norm", 0, "mlp_norm"),
    ],
)
def test_names_resolve(name: str, block: int, kind: str) -> None:
    feature = parse_feature(name, 12)
    assert (feature.block, feature.kind) == (block, kind)
    assert parse_feature(str(feature), 12) == feature
    assert not str(feature).startswith("blocks.-")


@pytest.mark.parametrize("name", ["blocks.12.query", "blocks.-13.query", "blocks.99.hidden"])
def test_a_missing_block_is_named_with_the_range(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*12 blocks"):
        parse_feature(name, 12)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "query",
        "blocks.4",
        "blocks.4.queries",
        "block.4.query",
        "blocks.x.query",
        "blocks.1.5.query",
        "blocks.4.query ",
        "blocks.4.query\n",
        "blocks.--1.query",
        None,
        4,
    ],
    ids=repr,
)
def test_another_form_is_refused_with_the_kinds(name: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown.*query"):
        parse_feature(name, 12)


@pytest.mark.parametrize(("layers", "block"), [(1, 0), (2, 0), (3, 1), (12, 4), (24, 9), (28, 11)])
def test_the_default_is_the_query_at_040_of_the_depth(layers: int, block: int) -> None:
    assert default_feature(layers) == f"blocks.{block}.query"


def test_all_features_are_listed_once_in_order() -> None:
    names = list_features(3)
    assert len(names) == len(set(names)) == 3 * len(FEATURE_KINDS)
    assert all(str(parse_feature(name, 3)) == name for name in names)
    assert names[0] == "blocks.0.attention_norm"
    assert names[-1] == "blocks.2.hidden"


def test_tokens_fold_row_major() -> None:
    tokens = torch.arange(2 * 3 * 5 * 4).reshape(2, 15, 4)
    folded = tokens_to_map(tokens, (3, 5))
    assert folded.shape == (2, 4, 3, 5)
    assert torch.equal(folded[1, :, 2, 3], tokens[1, 2 * 5 + 3])
    assert torch.equal(tokens_to_map(tokens[None], (3, 5))[0], folded)
