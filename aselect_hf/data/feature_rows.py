"""Rows of a feature set: ids, labels and vectors of images, batch by batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from aselect_hf.data.classes import UNLABELED
from aselect_hf.data.fingerprint import fingerprint
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.images import common_folder, image_pixels, read_image, stored_name
from aselect_hf.data.latent_cache import latent_shape
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor
from aselect_hf.modeling.noisy_backbone import FORMATS, NoisyBackbone
from aselect_hf.versions import installed_versions

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass
class RowBatch:
    """Rows of some images.

    Args:
        ids, rows: of each image.
        vectors: `(images, ...)` by column.
    """

    ids: list[str]
    rows: list[int]
    labels: list[int | None]
    vectors: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.vectors.values())


@dataclass
class Column:
    """One feature at one timestep, as `_features.json` describes it."""

    feature: str
    timestep: int
    sigma: float
    shape: tuple[int, ...]


@dataclass
class FeatureRows:
    """Computes the rows of a feature set, see `feature_set.write_feature_set` for the arguments.

    Args:
        folder: ids are paths below it (default: the common folder of all images).
    """

    model: NoisyBackbone
    images: ImageData
    columns: dict[str, Column]
    output_format: str
    dtype: str
    batch_size: int
    num_workers: int
    folder: str | None = None

    @classmethod
    def of(
        cls,
        model: NoisyBackbone,
        images: ImageData,
        features: Sequence[str] | None,
        timesteps: Sequence[int] | None,
        output_format: str,
        dtype: str,
        batch_size: int,
        num_workers: int = 0,
    ) -> FeatureRows:
        """Check the request and resolve its defaults.

        Raises:
            ValueError: an unknown feature, timestep, format or dtype, or a batch size below 1.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        if output_format not in FORMATS:
            raise ValueError(f"output_format must be one of {', '.join(FORMATS)}; got {output_format!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        config, schedule = model.config, model.noise_schedule
        names = [str(config.resolve_feature(name)) for name in features or [str(config.feature)]]
        steps = [schedule.check_timestep(t) for t in timesteps] if timesteps else [model.default_timestep]
        columns = {
            column_name(name, step): Column(
                name, step, schedule.sigma(step), _shape(model, images, name, output_format)
            )
            for name in dict.fromkeys(names)
            for step in dict.fromkeys(steps)
        }
        return cls(model, images, columns, output_format, dtype, batch_size, num_workers)

    @property
    def bytes_per_image(self) -> int:
        """Bytes of an image's vectors."""
        return DTYPES[self.dtype].itemsize * sum(int(np.prod(each.shape)) for each in self.columns.values())

    @property
    def features(self) -> list[str]:
        return list(dict.fromkeys(each.feature for each in self.columns.values()))

    @property
    def timesteps(self) -> list[int]:
        return list(dict.fromkeys(each.timestep for each in self.columns.values()))

    def columns_of(self, feature: str) -> list[str]:
        """Names of the columns of a feature, in the order of the timesteps."""
        resolved = str(self.model.config.resolve_feature(feature))
        return [name for name, each in self.columns.items() if each.feature == resolved]

    def describe(self) -> dict[str, Any]:
        """Everything that the values depend on; `request` is a hash of it and of the model's weights and the images."""
        model, config = self.model, self.model.config
        tensors = isinstance(self.images.decode(0), torch.Tensor)
        choices = {
            "format": FORMAT,
            "model": str(getattr(config, "_name_or_path", "") or type(model).__name__),
            "revision": getattr(config, "_commit_hash", None),
            "data": self.images.name,
            "columns": {name: vars(each) | {"shape": list(each.shape)} for name, each in self.columns.items()},
            "output_format": self.output_format,
            "dtype": self.dtype,
            "computed_in": str(model.dtype).removeprefix("torch."),
            "prompt": getattr(config, "prompt", None),
            "noise_draws": config.num_noise_draws,
            "channel_discard": getattr(config, "channel_discard", None),
            "preprocessing": None if tensors else json.loads(make_image_processor(config).to_json_string()),
            "label_names": self.images.label_names,
        }
        hashed = choices | {"images": self.images.fingerprint, "fields": model.fingerprint_fields()}
        hashed.pop("model")  # the same weights under another path are the same model
        labels = {} if self.images.labels is None else {"labels of the images": torch.from_numpy(self.images.labels)}
        choices["request"] = fingerprint(model.state_dict() | labels, hashed)
        return choices | {"versions": installed_versions()}

    @property
    def schema(self) -> pa.Schema:
        """Columns of the shards, with the types of `datasets` in their metadata."""
        names = self.images.label_names
        label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
        types: dict[str, Any] = {"id": datasets.Value("string"), "row": datasets.Value("int64")}
        types |= {"label": label, "label_name": datasets.Value("string")}
        for name, each in self.columns.items():
            kind: Any = datasets.Value(self.dtype)
            for size in reversed(each.shape):
                kind = datasets.List(kind, length=size)
            types[name] = kind
        return datasets.Features(types).arrow_schema

    @torch.no_grad()
    def batches(self, rows: range) -> Iterator[RowBatch]:
        """Rows of the images `rows`, in order."""
        folder = common_folder(self.images.items) if self.folder is None else self.folder
        reader = _Reader(self.images, rows, folder)
        loader: DataLoader = DataLoader(
            reader,
            batch_size=self.batch_size,
            collate_fn=_Collate(image_pixels(self.model.config)),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # leaves the caller's random state alone
        )
        for ids, numbers, labels, pixels in loader:
            yield RowBatch(ids, numbers, labels, self._vectors(pixels))

    def table(self, batches: Sequence[RowBatch], schema: pa.Schema) -> pa.Table:
        """Rows as a table of parquet."""
        names = self.images.label_names
        labels = [label for each in batches for label in each.labels]
        found: dict[str, Any] = {
            "id": [name for each in batches for name in each.ids],
            "row": [row for each in batches for row in each.rows],
            "label": labels,
            "label_name": [None if names is None or label is None else names[label] for label in labels],
        }
        for name in self.columns:
            found[name] = _fixed_lists(np.concatenate([each.vectors[name] for each in batches]))
        return pa.table(found, schema=schema)

    def _vectors(self, pixels: torch.Tensor) -> dict[str, np.ndarray]:
        """Features of a batch by column.

        Raises:
            ValueError: float16 cannot hold them.
        """
        options: dict[str, Any] = {"features": self.features, "timesteps": self.timesteps}
        found = self.model.extract_features(
            pixels.to(self.model.device),
            **options,
            output_format=self.output_format,
        )
        vectors = {}
        for name, each in self.columns.items():
            values = found[each.feature][:, self.timesteps.index(each.timestep)]
            stored = values.to("cpu", DTYPES[self.dtype])
            if not stored.isfinite().all():
                raise ValueError(f"float16 cannot hold {name}, as large as {values.abs().max():.3g}: use float32")
            vectors[name] = stored.numpy()
        return vectors


class _Reader(Dataset):
    """Decoded images with their ids, numbers and labels; can be pickled to worker processes."""

    def __init__(self, images: ImageData, rows: range, folder: str) -> None:
        self.images, self.rows, self.folder = images, rows, folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, int, int | None, Any]:
        images, row = self.images, self.rows[index]
        number = images.rows[row]
        item = images.items[row]
        label = UNLABELED if images.labels is None else int(images.labels[row])
        name = stored_name(item, self.folder) or str(number)
        image = read_image(item, f"image {number} of {images.name}")
        return name, number, None if label == UNLABELED else label, image


class _Collate:
    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels

    def __call__(self, rows: list[tuple[str, int, int | None, Any]]) -> tuple[list, list, list, torch.Tensor]:
        ids, numbers, labels, images = map(list, zip(*rows, strict=True))
        return ids, numbers, labels, self.pixels(images)


def column_name(feature: str, timestep: int) -> str:
    """A name that SQL, pandas and `datasets` take as it is: `blocks.4.query` at 50 is `blocks_4_query_t50`."""
    return f"{feature.replace('.', '_')}_t{timestep}"


def _shape(model: NoisyBackbone, images: ImageData, feature: str, output_format: str) -> tuple[int, ...]:
    """Shape of an image's feature; tensors keep their size, other images get the model's."""
    width = model.config.feature_width(feature)
    if output_format == "pooled":
        return (width,)
    height, breadth = model.grid_size(torch.empty(1, *latent_shape(model, images)))
    return (width, height, breadth) if output_format == "map" else (height * breadth, width)


def _fixed_lists(values: np.ndarray) -> pa.Array:
    """`(rows, ...)` as nested lists of fixed size, without a copy."""
    array: pa.Array = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array
