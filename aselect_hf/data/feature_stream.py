"""Features of a stream - WebDataset tars, parquet files, folders, the Hub - as a feature set, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
from tqdm.auto import tqdm

from aselect_hf.data.feature_rows import FeatureRows
from aselect_hf.data.feature_set import (
    GROUP_BYTES,
    FeatureSet,
    Part,
    opened,
    rows_in_groups,
    write_missing,
    write_shard,
)
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.images import undecoded_stream
from aselect_hf.data.stream_reader import StreamReader
from aselect_hf.files import as_path, check_space
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

HEAD_IMAGES = 16
"""The first images of a stream stand for its content in the record: nothing else is read before the work."""
CHUNK_IMAGES = 256
"""Encoded images that a process holds."""


def write_streamed_features(
    model: NoisyBackbone,
    stream: datasets.IterableDataset,
    folder: str | Path,
    *,
    name: str = "stream",
    image_column: str = "image",
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    root: str | Path | None = None,
    features: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    output_format: str = "pooled",
    dtype: str = "float32",
    split: str = "train",
    part: Part | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    on_error: str = "stop",
    progress: bool = True,
) -> FeatureSet:
    """As `write_feature_set`, of images that are read once, in order, and never counted or indexed.

    Each file of the stream (tar, parquet file; a folder of images has up to 64 parts) becomes one shard, so that this
    many processes can share the work. `id` is the key in a tar, or else the file's path below `root`; `row` is an
    image's number in its file. `_features.json` gives no number of images. A folder is taken for the same request if
    the number of files and the first images are the same.

    Args:
        stream: as `load_images(..., streaming=True)` opens it.
        label_column: of integers or named classes (default: `label`, if it is one).
        classes: names by which named labels are numbered (default: those of the stream).
        root: the folder that holds the files (default: ids are names of files without folders).
        on_error: `"stop"` at an image that cannot be read, or `"skip"` it.

    Raises:
        ValueError, OSError: as `write_feature_set`; labels without numbers.
    """
    reader = StreamReader(undecoded_stream(stream, on_error), name, image_column, label_column, classes)
    head = reader.beginning(HEAD_IMAGES)
    rows = FeatureRows.of(model, head, features, timesteps, output_format, dtype, batch_size, num_workers)
    rows.folder = str(root or "")
    record = rows.describe() | {"split": split, "images": None, "num_shards": reader.stream.num_shards}
    found = opened(as_path(folder), record, shards_given=True)
    mine = range(found.num_shards) if part is None else range(part.index, found.num_shards, part.count)
    missing = [shard for shard in mine if not found.is_whole(shard)]
    started, written = time.perf_counter(), 0
    with tqdm(desc=f"features of {name}", unit="image", disable=not progress) as bar:

        def write(shard: int) -> None:
            nonlocal written
            check_space(found.folder, GROUP_BYTES, "these features")
            write_shard(found, rows.schema, shard, _tables(rows, reader.chunks(shard, CHUNK_IMAGES), bar))
            written += 1
            left = (time.perf_counter() - started) / written * (len(missing) - written)
            bar.set_postfix_str(f"{written} of {len(missing)} shards, {tqdm.format_interval(left)} left")

        write_missing(found, missing, write)
    return found


def _tables(rows: FeatureRows, chunks: Iterator[ImageData], bar: tqdm) -> Iterator[pa.Table]:
    for images in chunks:
        each = replace(rows, images=images)
        yield from rows_in_groups(each, each.batches(range(len(images))), bar)
