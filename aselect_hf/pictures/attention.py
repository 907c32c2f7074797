"""Attention of one picture's patches to each other, in the families that compute it as a softmax."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.pictures.maps import SIDE, enlarged, frame_patch, heat
from aselect_hf.pictures.sweep import picture_latents


class _LastAttention(TorchFunctionMode):
    """Remembers the last call of softmax attention whose queries are at least as many as the patches."""

    def __init__(self, num_patches: int) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.call: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any, float | None] | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.scaled_dot_product_attention:
            self._remember(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _remember(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        if query.ndim == 4 and min(query.shape[-2], key.shape[-2]) >= self.num_patches:
            self.call = query, key, value, attn_mask, scale


@torch.inference_mode()
def attention_maps(
    model: NoisyBackbone, image: Any, timestep: int | None = None, block: int | None = None
) -> torch.Tensor:
    """The attention of every patch to every patch in one block, as the network itself computes it.

    It is computed from the queries and keys of the run, after any normalization and rotation of positions. Where text
    takes part, a row sums to less than 1: the rest goes to the text.

    Args:
        model: the backbone, in evaluation mode.
        image: PIL image, path, bytes or array; or a clean input `(1, channels, height, width)`.
        timestep: training index (default: the model's own).
        block: zero-based, negative from the end (default: that of `config.feature`).

    Returns:
        `(heads, patches, patches)` float32 on the CPU: queries, then keys, row-major over the patch grid.

    Raises:
        ValueError: no such block or timestep, a fixed timestep, or a family without softmax attention among patches
            (Sana's is linear).
    """
    index = model.config.resolve_feature(str(model.config.feature)).block if block is None else block
    names = [str(model.config.resolve_feature(f"blocks.{index}.{kind}")) for kind in ("value", "attention")]
    step = model.resolve_timestep(timestep)
    latents = picture_latents(model, image)
    noisy = model.noise_schedule.add_noise(latents, model.stored_noise(latents)[0].float(), step)
    height, width = model.grid_size(latents)
    with _eager_is_sdpa(model), _LastAttention(height * width) as last:
        found = model.features_of_noisy(noisy, torch.tensor([step], device=noisy.device), names)
    patches = _patches_in(last.call, found[names[0]][0]) if last.call else None
    if last.call is None or patches is None:
        raise ValueError(f"{model.config.network} has no softmax attention among patches in block {index}")
    query, key, _, mask, scale = last.call
    weights = query[0, :, patches].float() @ key[0].float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        rows = mask.expand(1, *weights.shape[:1], query.shape[-2], key.shape[-2])[0, :, patches]
        weights = weights.masked_fill(~rows, -torch.inf) if mask.dtype == torch.bool else weights + rows
    return weights.softmax(dim=-1)[..., patches].cpu()


def attention_picture(
    maps: torch.Tensor, grid_size: tuple[int, int], patch: tuple[int, int], *, side: int = SIDE
) -> Image.Image:
    """The attention of one patch, averaged over heads, as a picture whose brightest patch has the largest weight.

    Args:
        maps: `(heads, patches, patches)` of `attention_maps`; give one head as `maps[head : head + 1]`.
        grid_size: `(height, width)` of the patch grid.
        patch: `(row, column)` in the grid, counted from 0.
        side: of the result's longer side, in pixels.

    Raises:
        ValueError: shapes do not match, or there is no such patch.
    """
    height, width = grid_size
    if maps.ndim != 3 or maps.shape[1:] != (height * width, height * width):
        raise ValueError(f"maps must be (heads, {height * width}, {height * width}), got {tuple(maps.shape)}")
    if not (0 <= patch[0] < height and 0 <= patch[1] < width):
        raise ValueError(f"patch must be (row, column) within {height} x {width}, got {tuple(patch)}")
    weights = maps[:, patch[0] * width + patch[1]].mean(dim=0).view(grid_size)
    picture = enlarged(heat((weights / weights.max()).numpy()), side)
    frame_patch(picture, grid_size, patch)
    return picture


class _eager_is_sdpa:  # noqa: N801
    """For a while, a model that computes attention step by step calls the function that is listened to."""

    def __init__(self, model: NoisyBackbone) -> None:
        self.model, self.before = model, model.config._attn_implementation

    def __enter__(self) -> None:
        if self.before is not None and self.before != "sdpa":
            self.model.set_attn_implementation("sdpa")

    def __exit__(self, *error: Any) -> None:
        if self.before is not None and self.before != "sdpa":
            self.model.set_attn_implementation(self.before)


def _patches_in(call: tuple[torch.Tensor, ...], values: torch.Tensor) -> slice | None:
    """Where the patches are among all tokens, found by their values `(patches, width)`; `None` if nowhere."""
    tokens = call[2][0].transpose(0, 1).flatten(1)  # (all tokens, heads * width of a head)
    if tokens.shape[1] != values.shape[1]:
        return None
    for start in (0, len(tokens) - len(values)):
        if torch.equal(tokens[start : start + len(values)], values.to(tokens.dtype)):
            return slice(start, start + len(values))
    return None
