"""Build the shipped sample and the pretraining set from Fashion-MNIST's own IDX files (MIT, Zalando Research).

    python -m benchmarks.build_sample IDX_DIR --pretrain_dir runs/fashion-mnist-data

`IDX_DIR` holds the four `*-ubyte.gz` files of github.com/zalandoresearch/fashion-mnist. The command writes
`aselect_hf/sample/data/{train,validation,test}.parquet` (4,000 + 1,000 images of the training split and 2,000 of the
test split, drawn class by class with seed 0) and, for pretraining, all 60,000 training images. It also links the code
of the model into `aselect_hf/sample/model`.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import typer
from PIL import Image

from aselect_hf.data.sources import SAMPLE_DATA, SAMPLE_MODEL

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SIZES = {"train": 4000, "validation": 1000, "test": 2000}


def read_idx(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16)
    with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images.reshape(-1, 28, 28), labels


def to_dataset(images: np.ndarray, labels: np.ndarray) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def draw(labels: np.ndarray, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Draw disjoint, class-balanced, shuffled sets of indices with the given sizes."""
    generator = np.random.default_rng(seed)
    by_class = [generator.permutation(np.flatnonzero(labels == label)) for label in range(len(CLASSES))]
    drawn, start = {}, 0
    for name, size in sizes.items():
        count = size // len(CLASSES)
        drawn[name] = generator.permutation(np.concatenate([rows[start : start + count] for rows in by_class]))
        start += count
    return drawn


def carry_code(folder: Path) -> None:
    """Link the code beside the weights, so that `trust_remote_code=True` loads the folder without the package."""
    for file in sorted((folder.parents[1] / "modeling").glob("*.py")):
        link = folder / file.name
        if file.name != "__init__.py" and not link.exists():
            link.symlink_to(Path("../../modeling") / file.name)


def main(
    idx_dir: Annotated[Path, typer.Argument(help="Folder with the four *-ubyte.gz files.")],
    pretrain_dir: Annotated[Path, typer.Option(help="Folder to write the 60,000 pretraining images to.")],
) -> None:
    images, labels = read_idx(idx_dir, "train")
    test_images, test_labels = read_idx(idx_dir, "t10k")
    pretrain_dir.mkdir(parents=True, exist_ok=True)
    SAMPLE_DATA.mkdir(parents=True, exist_ok=True)
    carry_code(SAMPLE_MODEL)
    to_dataset(images, labels).to_parquet(pretrain_dir / "train.parquet")
    for name, rows in draw(labels, {key: SIZES[key] for key in ("train", "validation")}).items():
        to_dataset(images[rows], labels[rows]).to_parquet(SAMPLE_DATA / f"{name}.parquet")
    for name, rows in draw(test_labels, {"test": SIZES["test"]}).items():
        to_dataset(test_images[rows], test_labels[rows]).to_parquet(SAMPLE_DATA / f"{name}.parquet")


if __name__ == "__main__":
    typer.run(main)
