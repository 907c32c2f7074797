"""Features of a data set as parquet shards with ids and labels, which `datasets`, pandas and others read.

A folder holds `features-00000-of-00128.parquet` and so on, and `_features.json` with everything that the values depend
on. A shard is whole or absent and is never computed twice. Any number of processes, on any number of machines that see
the folder, may run the same request at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm.auto import tqdm
from transformers.utils import logging

from aselect_hf.data.feature_rows import FeatureRows, RowBatch
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.shards import take_turns
from aselect_hf.files import (
    as_path,
    atomic_file,
    check_space,
    check_writable,
    disk_errors,
    read_json,
    write_json,
)
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

logger = logging.get_logger(__name__)

RECORD = "_features.json"
"""Readers of parquet pass over files that begin with an underscore."""
SHARD_IMAGES, SHARD_BYTES, MOST_SHARDS = 256, 2**29, 128
"""By default a shard has at least this many images, and there are at most 128 shards of at most 512 MB each."""
GROUP_BYTES = 2**25
"""Bytes that a process collects before it writes them as one row group, besides one batch."""
LOCKS = ".locks"


@dataclass(frozen=True)
class Part:
    """One job of several that divide the shards without communication: job `index` of `count`, from 0.

    A job does the shards whose number leaves the remainder `index`.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`"3/16"` is job 3 of jobs 0 to 15.

        Raises:
            ValueError: the text has another form, or the job is not one of them.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"shard must be i/n with i in 0..n-1, as 0/16 for the first of 16 jobs; got {text!r}")
        return cls(int(index), int(count))


@dataclass
class FeatureSet:
    """A folder of features; `write_feature_set` fills it.

    Args:
        record: content of `_features.json`.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def num_images(self) -> int:
        """Number of images; of a stream, as far as it has been read."""
        if self.record["images"] is None:
            return sum(pq.read_metadata(path).num_rows for path in self.folder.glob("features-*.parquet"))
        return int(self.record["images"])

    @property
    def num_shards(self) -> int:
        return int(self.record["num_shards"])

    def path(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def rows(self, shard: int) -> range:
        """Images of a shard; sizes of shards differ by at most 1."""
        first, last = (self.num_images * each // self.num_shards for each in (shard, shard + 1))
        return range(first, last)

    def lock(self, name: str, timeout: float = -1) -> FileLock:
        (self.folder / LOCKS).mkdir(exist_ok=True)
        return FileLock(self.folder / LOCKS / f"{name}.lock", timeout=timeout)

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is finished and of this request, by its footer; a damaged one is reported.

        Pages have checksums of their own, which readers can verify (`page_checksum_verification` in pyarrow).
        """
        try:
            found = pq.read_metadata(self.path(shard))
            request = (found.metadata or {}).get(b"request", b"").decode()
            streamed = self.record["images"] is None
            if request == self.record["request"] and (streamed or found.num_rows == len(self.rows(shard))):
                return True
            problem = "it has other rows"
        except FileNotFoundError:
            return False
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            problem = str(error)
        logger.warning("%s is damaged (%s): computing it again", self.path(shard), problem)
        return False


def write_feature_set(
    model: NoisyBackbone,
    images: ImageData,
    folder: str | Path,
    *,
    features: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    output_format: str = "pooled",
    dtype: str = "float32",
    split: str = "train",
    num_shards: int | None = None,
    part: Part | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> FeatureSet:
    """Write features of all images to a folder of parquet shards, and return it when all shards are complete.

    Each row has `id` (the file's path below the common folder of all files, or else the stored name or the row's
    number), `row` (the image's number in the data), `label` and `label_name` (null for an image without a label) and
    one column a feature and timestep, `blocks_4_query_t50`. It holds lists of fixed size: `(width,)` of pooled
    features, `(tokens, width)`, or `(channels, height, width)` of maps.

    The same command goes on after an interruption: finished shards are kept, an unfinished one starts again. The result
    does not depend on the number of processes. Memory holds one batch, and the rows of at most 32 MB more.

    Args:
        features: names, as `blocks.4.query` (default: the model's own).
        timesteps: in this order (default: the model's own).
        output_format: `"pooled"`, `"tokens"` or `"map"`, see `NoisyBackbone.extract_features`.
        dtype: `"float32"` or `"float16"`.
        split: name of the split, for readers.
        num_shards: number of files (default: see `SHARD_IMAGES`).
        part: do only the shards of one job, and return when these are complete.
        batch_size: images per batch.
        num_workers: processes that decode images ahead (0: decode in this process).

    Raises:
        ValueError: an argument is wrong, the folder holds another request's features, an image cannot be read, values
            are too large for float16, or the disk has too little room.
        OSError: the disk filled up. Finished shards are kept.
    """
    rows = FeatureRows.of(model, images, features, timesteps, output_format, dtype, batch_size, num_workers)
    if num_shards is not None and not 1 <= num_shards <= len(images):
        raise ValueError(f"num_shards must be in 1..{len(images)} (the number of images), got {num_shards}")
    shards = num_shards or default_num_shards(len(images), rows.bytes_per_image)
    record = rows.describe() | {"split": split, "images": len(images), "num_shards": shards}
    found = opened(as_path(folder), record, num_shards is not None)
    mine = range(found.num_shards) if part is None else range(part.index, found.num_shards, part.count)
    missing = [shard for shard in mine if not found.is_whole(shard)]
    needed = rows.bytes_per_image * sum(len(found.rows(shard)) for shard in missing)
    check_space(found.folder, needed, "these features")
    done = sum(len(found.rows(shard)) for shard in mine) - sum(len(found.rows(shard)) for shard in missing)
    total = sum(len(found.rows(shard)) for shard in mine)
    with tqdm(total=total, initial=done, desc=f"features of {images.name}", unit="image", disable=not progress) as bar:

        def write(shard: int) -> None:
            write_shard(found, rows.schema, shard, rows_in_groups(rows, rows.batches(found.rows(shard)), bar))

        write_missing(found, missing, write)
        bar.update(total - bar.n)  # what others have done
    return found


def write_missing(found: FeatureSet, shards: Sequence[int], write: Callable[[int], None]) -> None:
    """Let `write` write those of `shards` that no other process writes, see `take_turns`."""

    def finish(shard: int) -> None:
        if not found.is_whole(shard):
            write(shard)

    take_turns(shards, lambda shard, timeout: found.lock(f"{shard:05d}", timeout), finish)


def default_num_shards(num_images: int, bytes_per_image: int) -> int:
    """Number of shards of a set, by its size only."""
    return max(1, min(MOST_SHARDS, -(-num_images // SHARD_IMAGES)), -(-num_images * bytes_per_image // SHARD_BYTES))


def opened(folder: Path, record: dict[str, Any], shards_given: bool) -> FeatureSet:
    """The folder with its record, which the first process writes and the others compare with their own request.

    Args:
        shards_given: whether the number of shards is part of the request.

    Raises:
        ValueError: the folder is not empty and not of this request.
    """
    found = FeatureSet(folder, record)
    check_writable(folder / RECORD)
    with found.lock("record"):
        if not (folder / RECORD).is_file():
            if others := [path.name for path in folder.iterdir() if path.name[0] != "."]:
                raise ValueError(f"output folder {folder} holds other files ({others[0]}): choose another, or empty it")
            write_json(folder / RECORD, record)
        present = read_json(folder / RECORD)
    ignored = {"versions"} if shards_given else {"versions", "num_shards"}
    differs = [name for name in record if name not in ignored and present.get(name) != record[name]]
    if differs:
        name = next((name for name in differs if name != "request"), differs[0])
        raise ValueError(
            f"output folder {folder} holds features of another request ({name}: {present.get(name)}, now "
            f"{record[name]}): choose another folder, or remove it"
        )
    return FeatureSet(folder, present)


def write_shard(found: FeatureSet, schema: pa.Schema, shard: int, groups: Iterator[pa.Table]) -> None:
    """Write one shard, whole or not at all; its lock is held, so that leftovers are of killed writers."""
    path = found.path(shard)
    for leftover in path.parent.glob(f".{path.name}*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    schema = schema.with_metadata({**(schema.metadata or {}), b"request": found.record["request"].encode()})
    with (
        disk_errors(path),
        atomic_file(path) as temporary,
        pq.ParquetWriter(
            temporary,
            schema,
            use_dictionary=["label_name"],
            write_page_checksum=True,
            write_statistics=[name for name in schema.names if name not in found.record["columns"]],
        ) as writer,
    ):
        for table in groups:
            writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=len(table))


def rows_in_groups(rows: FeatureRows, batches: Iterable[RowBatch], bar: tqdm) -> Iterator[pa.Table]:
    """Tables of several batches, each of which becomes one row group."""
    group: list[RowBatch] = []
    for batch in batches:
        group.append(batch)
        bar.update(len(batch.ids))
        if sum(each.nbytes for each in group) >= GROUP_BYTES:
            yield rows.table(group, rows.schema)
            group = []
    if group:
        yield rows.table(group, rows.schema)
