"""Images of two classes, and a selection on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aselect_hf import TimestepSelection, select_timestep
from aselect_hf.data.image_data import ImageData

TIMESTEPS = [0, 100, 500, 900]


@pytest.fixture
def labeled(normal) -> ImageData:
    """Two classes that differ in the sign of their mean."""
    labels = np.arange(40) % 2
    signs = torch.from_numpy(2.0 * labels - 1).float().view(-1, 1, 1, 1)
    return ImageData(0.3 * normal(40, 2, 8, 8) + signs, labels)


@pytest.fixture
def run(model, labeled, tmp_path):
    def run(method: str, **options) -> TimestepSelection:
        options = {"timesteps": TIMESTEPS, "cache_dir": tmp_path, "progress": False, "num_images": 8} | options
        if method == "gate":
            options = {"num_epochs": 1} | options
        return select_timestep(model, options.pop("images", labeled), method=method, **options)

    return run
