"""Low-rank adaptation (Hu et al. 2021) of the backbone's attention, through peft; merged before a model is saved."""

from __future__ import annotations

from typing import Any

from aselect_hf.modeling.feature_reader import FeatureReader


def add_lora(model: FeatureReader, rank: int) -> None:
    """Freeze the backbone, and add adapters to the attention projections that its features depend on.

    Raises:
        ValueError: peft is not installed, or the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora_rank needs peft: pip install 'aselect-hf[train]'") from error
    names = model.base_model.attention_projections(model.features)
    model.base_model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model.base_model)


def merge_lora(model: FeatureReader) -> None:
    """Fold adapters, if any, into the weights, which leaves an ordinary model."""
    for name, module in list(model.base_model.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            layer: Any = module
            layer.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(model.base_model, "peft_config"):
        del model.base_model.peft_config


__all__ = ["add_lora", "merge_lora"]
