"""What heads and backbones share: a DiT inside, some of whose features they read; the rest of it stays frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .features import parse_feature
from .modeling_aselect_dit import ASelectDiTModel, ASelectDiTPreTrainedModel

_ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_PARTS = {
    "attention_norm": (),
    "query": _ATTENTION[:1],
    "key": _ATTENTION[1:2],
    "value": _ATTENTION[2:3],
    "attention": _ATTENTION,
    "attention_gated": _ATTENTION,
    "mlp_norm": _ATTENTION,
    "mlp": (*_ATTENTION, "mlp"),
    "mlp_gated": (*_ATTENTION, "mlp"),
    "hidden": (*_ATTENTION, "mlp"),
}
"""Parts of a block that each kind of feature depends on, beside the block's modulation."""


def freeze_unused(model: ASelectDiTModel, features: Sequence[str]) -> None:
    """Freeze the VAE and every parameter of `model` that none of `features` depends on."""
    names = [parse_feature(name, len(model.layers)) for name in features]
    deepest = max(name.block for name in names)
    unused: list[nn.Module] = [model.final_layer, *model.layers[deepest + 1 :]]
    unused += model.condition_embeddings[deepest + 1 :]  # there is more than one only where every block has its own
    if model.vae is not None:
        unused.append(model.vae)
    used = {part for name in names if name.block == deepest for part in _PARTS[name.kind]}
    unused += [model.layers[deepest].get_submodule(part) for part in _PARTS["hidden"] if part not in used]
    for module in unused:
        module.requires_grad_(False)


class ASelectDiTFeatureReader(ASelectDiTPreTrainedModel):
    """A model that reads features of the DiT in `self.dit`; see `features`.

    What the features do not depend on gets no gradient: distributed training refuses trainable parameters without
    one. A subclass calls `freeze_unused` when its `dit` is built. LoRA through peft, of a model whose deepest feature
    is in block 13, with the head trained in full:
    `LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=list(range(13)), layers_pattern="layers",
    modules_to_save=["classifier"])` (`decode_head` for segmentation).
    """

    dit: ASelectDiTModel

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a checkpoint of the plain `ASelectDiTModel` loads too, its head is then new."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_unused()  # loading makes every parameter trainable
        return loaded

    @property
    def features(self) -> list[str]:
        """Names of the features that are read."""
        raise NotImplementedError

    def freeze_unused(self) -> None:
        """Freeze the VAE and what `features` do not depend on; again needed after `config` names deeper ones."""
        freeze_unused(self.dit, self.features)

    def freeze_backbone(self) -> None:
        """Freeze the whole DiT: only the head trains, and the DiT stays in evaluation mode under `train()`."""
        self.dit.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.dit.vae is not None:
            self.dit.vae.eval()
        if not any(parameter.requires_grad for parameter in self.dit.parameters()):
            self.dit.eval()
        return self


__all__ = ["ASelectDiTFeatureReader"]
