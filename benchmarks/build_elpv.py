"""Build ELPV (Buerhop-Lutz et al. 2018; Deitsch et al. 2019): photographs of intact and defective solar cells.

    pip download --no-deps elpv-dataset==1.0.0.post1 && unzip elpv_dataset-*.whl -d elpv
    python -m benchmarks.build_elpv elpv/elpv_dataset/data data/elpv

The photographs are licensed CC BY-NC-SA 4.0 (github.com/zae-bayern/elpv-dataset) and are not part of this repository.
The package has 2,624 gray electroluminescence photographs of 300 x 300 pixels, of mono- and polycrystalline cells, with
the probability of a defect. The set keeps the 1,508 with probability 0 (intact) and the 715 with probability 1
(defective), and drops 295 with 1/3 and 106 with 2/3. It is split with seed 0, stratified by class and kind of cell:
1,400 train, 500 validation, 323 test. Images are stored at 64 x 64 (area average) for models of 32 pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split

from aselect_hf.files import atomic_directory

CLASSES = ("intact", "defective")
SIDE = 64
SIZES = {"train": 1400, "validation": 500}
SEED = 0


def build(data: Path, output_dir: Path) -> None:
    """Write a parquet file for every split from the package's `labels.csv` and `images`."""
    table = np.genfromtxt(data / "labels.csv", dtype=None, names=["path", "defect", "kind"], encoding="utf-8")
    table = table[np.isin(table["defect"], (0, 1))]
    columns = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(CLASSES)),
        "kind": datasets.Value("string"),
    }
    with atomic_directory(output_dir) as folder:
        for split, rows in _split(table).items():
            images = [Image.open(data / path).resize((SIDE, SIDE), Image.Resampling.BOX) for path in rows["path"]]
            content = {"image": images, "label": rows["defect"].astype(int), "kind": rows["kind"]}
            datasets.Dataset.from_dict(content, datasets.Features(columns)).to_parquet(folder / f"{split}.parquet")
            print(f"{split}: {len(rows)} photographs, {int(rows['defect'].sum())} of them of defective cells")


def _split(table: np.ndarray) -> dict[str, np.ndarray]:
    splits = {}
    for name, size in SIZES.items():
        groups = np.char.add(table["kind"], table["defect"].astype(str))
        splits[name], table = train_test_split(table, train_size=size, stratify=groups, random_state=SEED)
    return splits | {"test": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with labels.csv and images")
    parser.add_argument("output_dir", type=Path, help="folder to write; must not exist")
    arguments = parser.parse_args()
    build(arguments.data, arguments.output_dir)


if __name__ == "__main__":
    main()
