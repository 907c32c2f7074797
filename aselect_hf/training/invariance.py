"""The Invariant Contamination Ratio (ICR) of a model in training: do its features keep what crops and noise change?

Li et al. (arXiv 2606.09718, section 5) follow it during training: it falls while a model learns, and rises again when
the model begins to memorize its images.
"""

from __future__ import annotations

from collections.abc import Callable

from accelerate import PartialState
from tqdm.auto import tqdm

from aselect_hf.data.feature_cache import pooled_rows
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection.criteria import icr
from aselect_hf.selection.feature_sweep import augmented_views, sweep_features
from aselect_hf.selection.inputs import SelectionInputs

NUM_IMAGES, NUM_VIEWS = 128, 2


def icr_of_training(model: NoisyBackbone, data: ImageData, seed: int) -> Callable[[int], dict[str, float]]:
    """A function that measures the ICR of the model's own feature at its own timestep, on fixed training images.

    Images, crops and noise are drawn once from the seed, so that only the weights change the number. Every process
    computes it alike.

    Args:
        data: training images, of which at most 128 are used.

    Returns:
        A function of the training step that returns `{"icr": 0 to 1}`; lower is better.

    Raises:
        ValueError: there is a single training image.
    """
    some = data.sample(NUM_IMAGES, seed)
    if len(some) < 2:
        raise ValueError(f"log_icr compares images, and needs at least 2 of them; the training data has {len(some)}")
    feature, timestep = str(model.config.resolve_feature(str(model.config.feature))), model.default_timestep
    inputs = SelectionInputs(model, some, None, feature, [timestep], seed, progress=False)
    rows = pooled_rows(model, len(some), 1)

    def measure(step: int) -> dict[str, float]:
        views = augmented_views(inputs, NUM_VIEWS)
        found = sweep_features(model, views, [timestep], [feature], rows, batch_size=inputs.fixed_batch_size)
        value = icr(found.values[feature][0])
        if PartialState().is_main_process:
            tqdm.write(f"step {step}: ICR {value:.4f} of {feature} at t = {timestep}")
        return {"icr": value}

    return measure
