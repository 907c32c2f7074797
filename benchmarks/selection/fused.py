"""What a second and a third timestep are worth: points of a probe on held-out images, and passes of the network.

    python -m benchmarks.selection.fused --model data/fashion-mnist-dit     # writes benchmarks/results/fused.json

Protocol. LogME chooses up to three timesteps of 8 from 500 labeled training images, as `aselect select
--num-timesteps-to-fuse 3` does. A linear probe reads token means of the first, of the first two, and of all three side
by side: trained on 80 % of 1,000 training images, by three seeds, its regularization chosen on 500 validation images,
scored on 1,000 test images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from aselect_hf.compare.run import score_probes
from aselect_hf.conversion import load_model
from aselect_hf.data.feature_cache import pooled_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from aselect_hf.files import read_json, write_text
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection import select_timestep
from aselect_hf.versions import hardware
from benchmarks.selection.curves import table

RESULT = Path(__file__).parents[1] / "results" / "fused.json"
IMAGES = {"train": 1000, "validation": 500, "test": 1000}
NUM_TIMESTEPS, NUM_FUSED, SEEDS = 8, 3, 3


def measure(
    model: NoisyBackbone, splits: dict[str, ImageData], num_images: int = 500, timesteps: int = NUM_TIMESTEPS
) -> dict[str, Any]:
    """Chosen timesteps in order, and the accuracies of probes that read the first one, two and three of them."""
    selection = select_timestep(
        model, splits["train"], method="logme", timesteps=timesteps, num_images=num_images,
        num_timesteps_to_fuse=NUM_FUSED, progress=False,
    )  # fmt: skip
    chosen = selection.fused_timesteps or [selection.timestep]
    with tempfile.TemporaryDirectory() as cache:
        features = {
            name: pooled_features(model, data, chosen, selection.feature, cache_dir=cache, progress=False).values
            for name, data in splits.items()
        }
        rows = []
        for count in range(1, len(chosen) + 1):
            side_by_side = {name: np.concatenate(values[:count], axis=1) for name, values in features.items()}
            validation, tests = score_probes(side_by_side, splits, "linear", SEEDS)
            rows.append({"timesteps": chosen[:count], "validation": validation, "test": tests})
    scores = selection.fused_scores
    return {"rows": rows, "scores": scores, "feature": selection.feature, "hardware": hardware(model.device)}


def fused_table(found: dict[str, Any]) -> str:
    """Accuracy, and what it gains over one timestep by the same seeds, beside the passes for every image."""
    first, rows = 100 * np.array(found["rows"][0]["test"]), []
    for row in found["rows"]:
        scores = 100 * np.array(row["test"])
        gain = scores - first
        rows.append([
            ", ".join(map(str, row["timesteps"])), str(len(row["timesteps"])),
            f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f}",
            "-" if len(row["timesteps"]) == 1 else f"{gain.mean():+.1f} ± {gain.std(ddof=1):.1f}",
        ])  # fmt: skip
    return table(["timesteps", "passes per image", "test accuracy, %", "gain, points"], rows)


def stored_table() -> str:
    """The table of what was measured."""
    return fused_table(read_json(RESULT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/fashion-mnist-dit", help="see pairs.py")
    model = load_model(parser.parse_args().model).eval()
    splits = {name: ImageData.of(load_images("sample", name)).sample(count, 0) for name, count in IMAGES.items()}
    found = measure(model, splits)
    write_text(RESULT, json.dumps(found))
    print(fused_table(found))


if __name__ == "__main__":
    main()
