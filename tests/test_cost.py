"""Counted operations are those of the definition, whatever kernels run."""

from __future__ import annotations

import pytest

from aselect_hf.cost import encode_flops, feature_flops


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_matrix_product_of_a_block_is_counted(make_model, attention):
    model = make_model()
    model.set_attn_implementation(attention)
    width, tokens = model.config.hidden_size, model.config.num_patches
    difference = feature_flops(model, "blocks.1.hidden") - feature_flops(model, "blocks.0.hidden")
    linear = tokens * (4 * width**2 + 2 * model.config.mlp_ratio * width**2)
    attention_products = 2 * tokens**2 * width
    assert difference == 2 * (linear + attention_products + 6 * width**2)


def test_pixels_are_encoded_for_nothing(model):
    assert encode_flops(model) == 0
