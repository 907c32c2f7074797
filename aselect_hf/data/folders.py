"""Folders of images and tables: which subfolders are classes, which are splits, and which files are not used.

`datasets` reads the files, but this module decides what they mean. On its own, `datasets` takes every folder or file
whose name contains "train", "test", "val", ... for a split, drops all others, and reads `[ ] * ?` in paths as patterns.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.errors import GatedRepoError
from transformers.utils import logging

from aselect_hf.files import read_json

logger = logging.get_logger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
SPLIT_NAME = re.compile(
    rf"({'|'.join(SPLIT_OF)})([-_.]?\d.*)?", re.IGNORECASE
)  # train, Val, train-00000-of-2, test2017
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_OF)})(?![a-z])", re.IGNORECASE)  # also in train_images
IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)
METADATA = frozenset(ImageFolder.METADATA_FILENAMES)
TABLES = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
ARCHIVES = frozenset({".zip"})
NO_DATA = frozenset({"id2label.json", "readme.md", "license", "license.txt", "thumbs.db", "desktop.ini"})
KEY = "__key__"  # of a sample in a WebDataset tar
STREAM_SHARDS = 64  # parts of a streamed folder of images, which workers and processes divide among themselves


def load_folder(folder: Path, split: str | None, config_name: str | None, *, streaming: bool) -> Any:
    """Load one split of a folder on disk; see `load_images`.

    Raises:
        ValueError: the folder has no data or no such split; the message lists what was found.
    """
    folder = folder.absolute()
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file; give the folder that holds it")
    if (folder / "dataset_dict.json").is_file():
        return _saved(folder / find_split(_saved_splits(folder), split, folder), streaming)
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return _saved(folder, streaming)
    if config_name or _has_configs(folder):
        loaded = read(folder, str(folder), config_name, streaming=streaming)
        return loaded[find_split(loaded, split, folder)]
    files = _files(folder)
    if any(map(_is_image, files)):
        return _load_images(folder, files, split, streaming)
    return _load_tables(folder, files, split, streaming)


def load_tars(pattern: Path, *, streaming: bool) -> Any:
    """Load the WebDataset tars that a path or pattern such as `data/train-*.tar` names.

    Raises:
        ValueError: there are none.
    """
    files = sorted(glob.glob(str(pattern)))
    if not files:
        raise ValueError(f"{str(pattern)!r} names no files")
    data_files = {"train": [_pattern(Path(file)) for file in files]}
    return _named(read(pattern, "webdataset", data_files=data_files, split="train", streaming=streaming))


def _named(dataset: Any) -> Any:
    """Tars with the column names of other data sets: `image` for the first column of images, `label` for `cls`."""
    features = dataset.features
    if features is None or KEY not in features:
        return dataset
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    names = dict(zip(images[:1], ["image"], strict=False)) | ({"cls": "label"} if "cls" in features else {})
    return dataset.rename_columns({old: new for old, new in names.items() if old != new and new not in features})


def find_split(names: Iterable[str], split: str | None, source: Any) -> str:
    """Find a split by its name or by a synonym: `validation` also finds `val`, `dev`, ...

    Args:
        split: the name (default: `"train"`, or the only split).
    """
    names = sorted(names, key=lambda name: [*SPLITS, ""].index(_kind(name)))
    wanted = split or (names[0] if len(names) == 1 else "train")
    alike = [name for name in names if _kind(name) == wanted]
    if wanted in names or len(alike) == 1:
        return wanted if wanted in names else alike[0]
    raise ValueError(f"{str(source)!r} has no split {wanted!r}; it has {', '.join(names)}")


def _kind(name: str) -> str:
    """The split that a name stands for; empty if it stands for none."""
    match = SPLIT_NAME.fullmatch(name)
    return SPLIT_OF[match[1].lower()] if match else ""


def read(source: Any, *arguments: Any, **options: Any) -> Any:
    """Call `datasets.load_dataset`; errors name the source and fit on one line."""
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # including those of pyarrow, pandas, yaml and the Hub
        if isinstance(error.__cause__, GatedRepoError):
            raise ValueError(
                f"data set {str(source)!r} is gated: accept its terms at https://huggingface.co/datasets/{source}, "
                "then run `hf auth login`"
            ) from error
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        lines = str(cause or error).splitlines() or [repr(error)]
        raise ValueError(
            f"cannot load images from {str(source)!r}: it is neither 'sample', a folder of images or parquet files, "
            f"nor a data set reachable on the Hub ({lines[0][:300]})"
        ) from error


def _saved_splits(folder: Path) -> list[str]:
    file = folder / "dataset_dict.json"
    try:
        return list(read_json(file)["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not list the splits that save_to_disk wrote ({error!r})") from error


def _saved(folder: Path, streaming: bool) -> Any:
    _pattern(folder)
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"cannot read what save_to_disk wrote to {str(folder)!r} ({error})") from error
    return dataset.to_iterable_dataset() if streaming else dataset


def _has_configs(folder: Path) -> bool:
    """Whether a data set card assigns files to splits, so that nothing has to be guessed."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    try:
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except yaml.YAMLError:
        return False
    return isinstance(header, dict) and "configs" in header


def _files(folder: Path) -> list[Path]:
    """Relative paths of all files except hidden ones, sorted; links to folders are followed."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        if Path(os.path.realpath(os.path.dirname(parent))).is_relative_to(os.path.realpath(parent)):
            folders.clear()  # a link to a parent folder
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(parent, name).relative_to(folder) for name in names if not name.startswith((".", "__"))]
    return sorted((file for file in found if file.name.lower() not in NO_DATA), key=lambda file: file.parts)


def _inner(files: list[Path]) -> tuple[list[Path], Path]:
    """Strip a common top folder, unless it is a split, as often as possible; return the files and what was stripped."""
    prefix = Path()
    while True:
        tops = {file.parts[0] if len(file.parts) > 1 else "" for file in files}
        top = tops.pop() if len(tops) == 1 else ""
        if not top or _kind(top):
            return files, prefix
        files, prefix = [file.relative_to(top) for file in files], prefix / top


def _load_images(folder: Path, files: list[Path], split: str | None, streaming: bool) -> Any:
    """Load one split of a folder of images: if all its folders are named like splits, one of them, else everything."""
    images, inner = _inner([file for file in files if _is_image(file)])
    root = folder / inner
    tops = {image.parts[0] for image in images if len(image.parts) > 1}
    splits = sorted(filter(_kind, tops))
    words = [match[1].lower() for match in map(SPLIT_WORD.search, tops) if match]
    if not splits and len(set(words)) > 1 and len(words) == len(tops):
        raise ValueError(
            f"{str(folder)!r} holds folders that may be splits or classes ({', '.join(sorted(tops))}): rename splits "
            "to train, validation and test, or give the path of one of these folders"
        )
    sets = [inner]
    if splits and len(splits) == len(tops):
        _say_unused(folder, sum(len(image.parts) == 1 for image in images), "images lie beside the folders of splits")
        sets, root = [inner / name for name in splits], root / find_split(splits, split, folder)
    elif splits and not any(image.parts[0] in splits for image in images if len(image.parts) == 2):
        raise ValueError(
            f"{str(folder)!r} holds folders named like splits ({', '.join(splits)}) beside others "
            f"({', '.join(sorted(tops - set(splits))[:5])}): keep only splits in it, or give the path of one folder"
        )
    elif split and _kind(split) != "train":
        raise ValueError(
            f"{str(folder)!r} has no split {split!r}: its folders are not splits, so all its images form one split"
        )
    elif splits:
        logger.warning(f"{folder}: {', '.join(splits)}: read as classes, not splits, like the folders beside them.")
    _say_strangers(folder, [file for file in files if not any(map(file.is_relative_to, sets))])
    return _load_set(root, folder, streaming)


def _load_set(root: Path, outer: Path, streaming: bool) -> Any:
    """Load all images below a folder with the columns of its metadata, else labeled by class folders, else unlabeled.

    Args:
        outer: `root` or a folder above it; metadata files from there down to `root` may name these images.
    """
    files = _files(root)
    images = [file for file in files if _is_image(file)]
    metadata = [root / file for file in files if file.name in METADATA]
    above = [parent for parent in root.parents if parent.is_relative_to(outer)]
    metadata += [parent / name for parent in above for name in sorted(METADATA) if (parent / name).is_file()]
    _say_strangers(root, files)
    if metadata:
        return _load_metadata(root, metadata, len(images), streaming)
    below, inner = _inner(images)
    classes = sorted({image.parts[0] for image in below if len(image.parts) > 1})
    if len(classes) < 2:
        return _listed([root / image for image in images], None, [], streaming)
    if not any(len(image.parts) == 2 for image in below):
        logger.warning(
            f"{root}: it is unclear which folders are classes ({below[0].parent} and others), so no labels are used; "
            "give the path of the folder that holds the class folders."
        )
        return _listed([root / image for image in images], None, [], streaming)
    kept = [image for image in below if len(image.parts) > 1]
    _say_unused(root, len(below) - len(kept), "images lie beside the class folders")
    labels = [classes.index(image.parts[0]) for image in kept]
    return _listed([root / inner / image for image in kept], labels, classes, streaming)


def _listed(paths: list[Path], labels: list[int] | None, classes: list[str], streaming: bool) -> Any:
    columns: dict[str, Any] = {"image": [os.path.abspath(path) for path in paths]}
    features: dict[str, Any] = {"image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=classes)
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return dataset.to_iterable_dataset(min(STREAM_SHARDS, len(dataset))) if streaming else dataset


def _load_metadata(root: Path, metadata: list[Path], num_images: int, streaming: bool) -> Any:
    files = [f"{_pattern(root)}/**", *map(_pattern, metadata)]
    shared = not all(file.is_relative_to(root) for file in metadata)
    streamed = streaming and not shared
    dataset = read(root, "imagefolder", data_files={"train": files}, split="train", streaming=streamed)
    if streamed:
        return dataset
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if shared:
        dataset = _below(root, dataset, images[0])
    _say_unused(root, num_images - len(images) * len(dataset), "images are not named by the metadata")
    return dataset.to_iterable_dataset(min(STREAM_SHARDS, len(dataset))) if streaming else dataset


def _below(root: Path, dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The rows whose image lies below `root`; metadata above the split folders names the images of all splits."""
    paths = dataset.cast_column(column, datasets.Image(decode=False))[column]
    rows = [row for row, image in enumerate(paths) if Path(os.path.normpath(image["path"])).is_relative_to(root)]
    if not rows:
        raise ValueError(f"{str(root)!r}: the metadata in the folders above names none of its images")
    return dataset.select(rows)


def _load_tables(folder: Path, files: list[Path], split: str | None, streaming: bool) -> Any:
    """Load one split of a folder of tables; if no file or folder is named like a split, all of them form one split."""
    suffix = next((suffix for suffix in TABLES if any(file.suffix == suffix for file in files)), None)
    if suffix is None and any(file.suffix in ARCHIVES for file in files):
        loaded = read(folder, str(folder), streaming=streaming)
        return loaded[find_split(loaded, split, folder)]
    if suffix is None:
        found = ", ".join(
            f"{count} {name}" for name, count in Counter(f.suffix or f.name for f in files).most_common(5)
        )
        raise ValueError(f"{str(folder)!r} holds neither images nor tables; found {found or 'nothing'}")
    tables, inner = _inner([file for file in files if file.suffix == suffix])
    splits: dict[str, list[str]] = defaultdict(list)
    for table in tables:
        match = SPLIT_NAME.fullmatch(table.parts[0]) or SPLIT_NAME.fullmatch(table.stem)
        splits[match[1] if match else ""].append(_pattern(folder / inner / table))
    if "" in splits and len(splits) > 1:
        raise ValueError(
            f"{str(folder)!r} holds splits ({', '.join(sorted(filter(None, splits)))}) beside other {suffix} files "
            f"({Path(splits[''][0]).name}): keep only splits in it"
        )
    if "" in splits:
        splits = {"train": splits[""]}
    name = find_split(splits, split, folder)
    data_files = {"train": splits[name]}
    return _named(read(folder, TABLES[suffix], data_files=data_files, split="train", streaming=streaming))


def _pattern(path: Path) -> str:
    """The path escaped so that `datasets` does not read it as a pattern."""
    if "::" in str(path):
        raise ValueError(f"{str(path)!r}: `datasets` reads '::' in a path as an archive; rename the folder")
    return glob.escape(os.path.abspath(path))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _say_strangers(folder: Path, files: list[Path]) -> None:
    found = Counter(file.suffix.lower() or file.name for file in files if not _is_image(file) | (file.name in METADATA))
    _say_unused(folder, found.total(), f"files are not images ({', '.join(sorted(found)[:5])})")


def _say_unused(folder: Path, count: int, what: str) -> None:
    if count > 0:
        logger.warning(f"{folder}: {count} {what}: not used.")
