"""Images of a stream, whose rows are read once and in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import datasets
from transformers.utils import logging

from aselect_hf.data.folders import KEY
from aselect_hf.data.image_data import LABEL_COLUMN, ImageData

logger = logging.get_logger(__name__)


class StreamReader:
    """Rows of a stream as images with labels, a few at a time.

    Args:
        stream: of undecoded images, see `undecoded_stream`.
        label_column: of integers or named classes (default: `label`, if it is one; a warning says so if it is not).
        classes: names by which labels are numbered (default: those of the stream).

    Raises:
        ValueError: the columns are not there, or labels have no numbers.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        name: str,
        image_column: str,
        label_column: str | None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.stream, self.name, self.image_column = stream, name, image_column
        features = stream.features or {}
        for column in filter(None, (image_column, label_column)):
            if column not in features:
                raise ValueError(f"the stream has no column {column!r}; it has {', '.join(features) or 'no columns'}")
        feature = features.get(label_column or LABEL_COLUMN)
        numbered = isinstance(feature, datasets.ClassLabel) or "int" in str(getattr(feature, "dtype", ""))
        if label_column and not numbered:
            raise ValueError(
                f"label_column {label_column!r} of a stream must hold integers or named classes, got {feature}: "
                "other labels are numbered only when all of them are known, without streaming"
            )
        if feature is not None and not numbered:
            logger.warning(
                "no labels are read: %s of the stream holds %s, not integers or named classes", LABEL_COLUMN, feature
            )
        self.classes = classes
        self.label_column = (label_column or LABEL_COLUMN) if numbered else None
        self.label_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    def images(self, rows: list[dict[str, Any]], first: int) -> ImageData:
        """Some rows, of which the first is row `first` of its file."""
        labels = [row[self.label_column] for row in rows] if self.label_column else None
        data = ImageData([self._item(row) for row in rows], labels, self.label_names, self.name)
        data.rows = range(first, first + len(rows))
        data.label_names = self.label_names
        return data if self.classes is None or self.label_names is None else data.with_classes(self.classes)

    def beginning(self, count: int) -> ImageData:
        """The first images."""
        return self.images(list(islice(self.stream, count)), 0)

    def _item(self, row: dict[str, Any]) -> Any:
        """An undecoded image, in a tar named by its key."""
        item = row[self.image_column]
        return item | {"path": row[KEY]} if KEY in row and isinstance(item, dict) else item

    def chunks(self, shard: int, size: int) -> Iterator[ImageData]:
        """The images of one file, at most `size` at a time."""
        source, first = iter(self.stream.shard(self.stream.num_shards, shard)), 0
        while rows := list(islice(source, size)):
            yield self.images(rows, first)
            first += len(rows)
