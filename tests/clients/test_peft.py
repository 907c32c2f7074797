"""Adapters of peft, with a task type and without, saved, loaded and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'aselect-hf[train]'")

TARGETS = ["q_proj", "v_proj"]
METHODS: dict[str, Any] = {
    "lora": lambda **options: peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **options),
    "dora": lambda **options: peft.LoraConfig(r=2, use_dora=True, target_modules=TARGETS, **options),
    "ia3": lambda **options: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False, **options
    ),
    "vera": lambda **options: peft.VeraConfig(r=4, target_modules=TARGETS, **options),
    "boft": lambda **options: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS, **options),
    "oft": lambda **options: peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS, **options),
    "loha": lambda **options: peft.LoHaConfig(r=2, target_modules=TARGETS, **options),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ours-classifier", "vit-classifier"])
def test_an_adapter_with_a_head(name: str, method: str, build: Any, pixels: torch.Tensor, tmp_path: Path) -> None:
    """Every trainable parameter gets a gradient; a step, a save and a load later the logits are the same."""
    model = peft.get_peft_model(build(name), METHODS[method](modules_to_save=["classifier"])).train()
    model(pixel_values=pixels, labels=torch.tensor([0, 1, 0])).loss.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert {key for key, p in trained.items() if p.grad is None} == set()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        torch.testing.assert_close(loaded(pixel_values=pixels).logits, expected)
        torch.testing.assert_close(
            loaded.merge_and_unload()(pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ours", "vit"])
def test_feature_extraction(name: str, method: str, build: Any, pixels: torch.Tensor, tmp_path: Path) -> None:
    """This task type hands `input_ids`, `attention_mask` and others to the model, all `None`."""
    model = peft.get_peft_model(build(name), METHODS[method](task_type="FEATURE_EXTRACTION")).eval()
    with torch.no_grad():
        expected = model(pixel_values=pixels).pooler_output
        hidden = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values=pixels).pooler_output, expected)


@pytest.mark.parametrize("name", ["ours", "ours-classifier"])
def test_the_projections_of_a_feature_that_is_read_early(name: str, build: Any, pixels: torch.Tensor) -> None:
    """Adapters sit on what runs, and nowhere else."""
    base = build(name, feature="blocks.1.key", num_hidden_layers=6)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=base.attention_projections()))
    model(pixel_values=pixels)[0].sum().backward()
    adapters = {key: p for key, p in model.named_parameters() if "lora_" in key}
    assert len(adapters) == 2 * 5
    assert all(parameter.grad is not None for parameter in adapters.values())


@pytest.mark.parametrize("name", ["ours-segmenter", "ours-fixed-classifier"])
def test_the_other_heads(name: str, build: Any, pixels: torch.Tensor) -> None:
    base = build(name)
    head = "decode_head" if name == "ours-segmenter" else "classifier"
    config = peft.LoraConfig(r=2, target_modules=base.attention_projections(), modules_to_save=[head])
    model = peft.get_peft_model(base, config)
    model(pixel_values=pixels).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["ours-classifier", "vit-classifier"])
def test_transformers_own_adapter_interface(name: str, build: Any, pixels: torch.Tensor, tmp_path: Path) -> None:
    model = build(name)
    model.add_adapter(METHODS["lora"]())
    with torch.no_grad():
        expected = model(pixels).logits
    model.save_pretrained(tmp_path)
    loaded = build(name)
    loaded.load_adapter(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(pixels).logits, expected)
