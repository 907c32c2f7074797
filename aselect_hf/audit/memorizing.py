"""Memorized images: where features of training images are best says little about other images.

Li et al. (arXiv 2502.05743) find that a network that generalizes is best at an intermediate noise level, while one that
memorizes is best at the cleanest inputs, for the images it was trained on only.
"""

from __future__ import annotations

from typing import Any

from aselect_hf.audit.curves import regret_by
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection import TimestepSelection, select_timestep


def warn_of_memorizing(
    model: NoisyBackbone, checked: TimestepSelection, held_out: ImageData, labeled: bool, run: dict[str, Any], seed: int
) -> list[str]:
    """Warn if held-out images are best at a noisier timestep, where the other images' best loses significantly.

    Args:
        checked: the curve of the rule that checks, on the images that were picked on.
        held_out: images that the network was not trained on, with labels if `labeled`.
        run: options of `select_timestep` that both curves share.
    """
    other = select_timestep(model, held_out, method=checked.method, **run | {"timesteps": checked.timesteps})
    if checked.timestep >= other.timestep:
        return []
    regret = regret_by(other, other.timesteps.index(checked.timestep), seed)
    if regret.lower <= 0:
        return []
    loss = f", where t = {checked.timestep} loses about {regret.estimate:.1f} points" if labeled else ""
    return [
        f"the network may have memorized these images: by {checked.method} they are best at t = {checked.timestep}, "
        f"but held-out images at t = {other.timestep}{loss}; pick on held-out images"
    ]
