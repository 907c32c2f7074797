"""Sources of data sets: the shipped sample, folders, data sets written by `save_to_disk`, and the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import datasets
import numpy as np
from huggingface_hub import hf_hub_download
from PIL import Image

from aselect_hf.data.folders import find_split, load_folder, load_tars, read
from aselect_hf.files import as_path, read_json

SAMPLE_DIR = Path(__file__).parents[1] / "sample"
SAMPLE_DATA, SAMPLE_MODEL = SAMPLE_DIR / "data", SAMPLE_DIR / "model"
MASK_COLUMNS = ("mask", "annotation", "segmentation", "label")
MASK_NAMES_FILE = "id2label.json"


@overload
def load_images(
    source: str | Path,
    split: str | None = None,
    config_name: str | None = None,
    *,
    masks: bool = False,
    streaming: Literal[False] = False,
) -> datasets.Dataset: ...


@overload
def load_images(
    source: str | Path,
    split: str | None = None,
    config_name: str | None = None,
    *,
    masks: bool = False,
    streaming: Literal[True],
) -> datasets.IterableDataset: ...


def load_images(
    source: str | Path,
    split: str | None = None,
    config_name: str | None = None,
    *,
    masks: bool = False,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of a data set.

    Args:
        source: `"sample"` (shipped with the package); a folder of images, parquet files or WebDataset tars, or one
            written by `save_to_disk`; a tar or a pattern such as `data/*.tar`; or a data set id on the Hub. Two or
            more folders of images are classes, whatever their names, unless all of them are named like splits
            (`train`, `val`, `validation`, `test`, ...).
        split: name of the split, or a synonym (default: `"train"`, or the only split).
        masks: add a column `mask` to the sample, see `sample_masks`. Other sources are not changed.
        streaming: read rows when they are needed, without downloading or indexing first, but without random access.

    Raises:
        ValueError: the source has no data or no such split; the message lists what was found.
    """
    loaded: Any
    path = SAMPLE_DATA if source == "sample" else as_path(source)
    if path.suffix == ".tar":
        loaded = load_tars(path, streaming=streaming)
    elif path.exists():
        loaded = load_folder(path, split, config_name, streaming=streaming)
    else:
        loaded = read(source, str(source), config_name, streaming=streaming)
        loaded = loaded[find_split(loaded, split, source)]
    return sample_masks(loaded) if masks and source == "sample" else loaded


def refuse_shared_splits(splits: Mapping[str, str | None]) -> None:
    """Check that no split serves both to train and to evaluate a model.

    Args:
        splits: names of splits by argument name; `None` if the argument is not given.

    Raises:
        ValueError: two arguments name the same split.
    """
    owners: dict[str, str] = {}
    for argument, split in splits.items():
        if split is not None and owners.setdefault(split, argument) != argument:
            raise ValueError(
                f"{argument} and {owners[split]} are both {split!r}: a model cannot be evaluated on images that "
                "trained it; give another split"
            )


def sample_masks(dataset: Any) -> Any:
    """Derive masks from the sample's labels: black pixels are class 0, all other pixels `label + 1`.

    Args:
        dataset: a split of the sample, map-style or streamed.

    Returns:
        The split with a column `mask`, whose class names are `load_mask_names("sample")`.
    """

    def add_mask(row: dict[str, Any]) -> dict[str, Any]:
        classes = np.where(np.asarray(row["image"]) > 0, row["label"] + 1, 0)
        return {"mask": Image.fromarray(classes.astype(np.uint8))}

    features = datasets.Features({**dataset.features, "mask": datasets.Image()})
    progress = {"desc": "masks of the sample"} if isinstance(dataset, datasets.Dataset) else {}
    return dataset.map(add_mask, features=features, **progress)


def load_mask_names(source: str | Path) -> list[str] | dict[int, str] | None:
    """Names of the classes in a data set's masks, in order; a dictionary by pixel value if values are not 0, 1, 2, ...

    They are read from `id2label.json` (`{"0": "wall", ...}`, the convention of segmentation data sets on the Hub) in
    the folder or Hub repository `source`. The result is `None` if the file is absent or the Hub cannot be reached.

    Raises:
        ValueError: the file does not name classes by numbers from 0 up, or it names only one class and that is not 0.
    """
    if source == "sample":
        return ["background", *load_images("sample").features["label"].names]
    file = as_path(source) / MASK_NAMES_FILE
    if not file.parent.exists():
        try:
            file = Path(hf_hub_download(str(source), MASK_NAMES_FILE, repo_type="dataset"))
        except (OSError, ValueError):
            return None
    if not file.is_file():
        return None
    try:
        names = {int(value): str(name) for value, name in read_json(file).items()}
        if sorted(names) == [*range(len(names))]:
            return [names[value] for value in range(len(names))]
        if min(names) < 0 or len(names) < 2:
            raise ValueError(f"it names {', '.join(map(str, names))}")
        return names
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} must name classes by number, as in {{'0': name, ...}} ({error!r})") from error


def find_mask_column(features: datasets.Features, image_column: str, mask_column: str | None) -> str | None:
    """The column of masks: `mask_column` or, if absent, the first of `MASK_COLUMNS` that holds images.

    Raises:
        ValueError: `mask_column` does not exist, or does not hold images.
    """
    if mask_column is None:
        candidates = [name for name in MASK_COLUMNS if name != image_column]
        return next((name for name in candidates if isinstance(features.get(name), datasets.Image)), None)
    if not isinstance(features.get(mask_column), datasets.Image):
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        raise ValueError(f"mask_column {mask_column!r} is not a column of images (those are {', '.join(images)})")
    return mask_column
