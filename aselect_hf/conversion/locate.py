"""Finding a checkpoint, detecting its format, and downloading only the files that are needed."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.repocard import metadata_load

from aselect_hf.conversion.weights import file_names, first_line, shards_of
from aselect_hf.data.sources import SAMPLE_MODEL
from aselect_hf.files import as_path, read_json
from aselect_hf.modeling.configuration_aselect_diffusion import ASelectDiffusionConfig
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.families import FAMILIES, find_family

logger = logging.getLogger(__name__)

ORIGINAL_LICENSES = {"dit": "cc-by-nc-4.0", "sit": "mit"}
"""Kinds of original `.pt` files and the licenses under which they were published."""
LICENSE_FILES = ("LICENSE*", "NOTICE*")
"""Patterns of the files in the root folder that say under which terms a model may be used and passed on."""
DIT = ("DiTTransformer2DModel", "Transformer2DModel")
"""Names of DiT's class in diffusers; the second is that before 0.29, and in the published repositories."""
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What a `Transformer2DModel` of older repositories is today, by its `norm_type`."""
DESCRIPTIONS = (
    "config.json", "model_index.json", "preprocessor_config.json", "scheduler/scheduler_config.json",
    "transformer/config.json", "vae/config.json",
)  # fmt: skip
"""The small files that describe a checkpoint; its card and license are in the root folder."""


def config_keywords(config_class: Any) -> set[str]:
    """Names of the fields of a config that may be given."""
    names = {field.name for field in dataclasses.fields(config_class) if field.name != "dtype"}
    return names | {"attn_implementation", "num_labels", "out_features", "out_indices"}


CONFIG_KEYWORDS = config_keywords(ASelectDiTConfig)


@dataclass(frozen=True)
class LoadingOptions:
    """Where and how to read a checkpoint. All functions that read one share these options; they are never stored.

    Args:
        token, revision, cache_dir, local_files_only, force_download: Hub options, as in Hugging Face's libraries.
        subfolder: folder of the checkpoint inside `source`.
        variant: variant of the weight files, such as `"fp16"`. A VAE without files of this variant is read without it.
        dtype: name or `torch.dtype` of the returned model and its VAE (default: the dtype of the weights).
        allow_pickle: also read `.pt` and `.bin` files, with `weights_only=True`.

    Raises:
        ValueError: `dtype` is not a floating-point dtype.
    """

    token: str | bool | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str | None = None
    variant: str | None = None
    dtype: Any = None
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        dtype = None if self.dtype == "auto" else self.dtype
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating-point dtype such as 'bfloat16', got {self.dtype!r}")
        object.__setattr__(self, "dtype", dtype)

    @property
    def hub(self) -> dict[str, Any]:
        """The options for the Hub's client."""
        names = ("token", "revision", "cache_dir", "local_files_only", "force_download")
        return {name: getattr(self, name) for name in names}

    @property
    def of_another_repository(self) -> LoadingOptions:
        """The same options without those that apply to one repository only."""
        return dataclasses.replace(self, revision=None, subfolder=None)


LOADING_KEYWORDS = tuple(field.name for field in dataclasses.fields(LoadingOptions))


def split_keywords(
    function: str, keywords: dict[str, Any], also_diffusion: bool = False
) -> tuple[LoadingOptions, dict[str, Any]]:
    """Split keyword arguments into loading options and fields of a DiT's config, or of other families' if asked.

    Raises:
        TypeError: a keyword is neither.
    """
    accepted = {
        *LOADING_KEYWORDS,
        *CONFIG_KEYWORDS,
        *(config_keywords(ASelectDiffusionConfig) if also_diffusion else ()),
    }
    for name in keywords:
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}: {hint}it takes "
                f"{', '.join(LOADING_KEYWORDS)} and the fields of the model's config"
            )
    options = {name: value for name, value in keywords.items() if name in LOADING_KEYWORDS}
    return LoadingOptions(**options), {name: value for name, value in keywords.items() if name not in options}


@dataclass(frozen=True)
class Source:
    """A local checkpoint: its folder or file, and the root folder of the repository (or folder) that holds it."""

    path: Path
    root: Path
    hub_id: str | None = None

    @property
    def card(self) -> dict[str, Any]:
        """The metadata of the model card; empty if there are none or, with a warning, if they cannot be read."""
        cards = (folder / "README.md" for folder in dict.fromkeys((self.path, self.root)))
        for card in cards:
            if card.is_file():
                try:
                    return metadata_load(card) or {}
                except (yaml.YAMLError, ValueError, OSError) as error:
                    logger.warning(
                        "the metadata in %s cannot be read (%s): the license is unknown; pass base_model_license",
                        card, first_line(error),
                    )  # fmt: skip
        return {}

    @property
    def license_files(self) -> dict[str, bytes]:
        """Content of the files with the license and its notices, by name."""
        found = [path for name in LICENSE_FILES for path in sorted(self.root.glob(name))] if self.root.is_dir() else []
        return {path.name: path.read_bytes() for path in found if path.is_file()}


def locate(source: str | Path, options: LoadingOptions | None = None, with_vae: bool = True) -> Source:
    """Find a checkpoint by its path or Hub id; `"sample"` is the shipped model.

    Only the files that describe it and the weights of the DiT, and of the VAE if `with_vae`, are downloaded. Of other
    pipelines, weights are left to `fetch_weights`.

    Raises:
        ValueError: the path does not exist, and neither does the repository, revision or folder on the Hub.
    """
    options = options or LoadingOptions()
    if str(source) == "sample":
        return Source(SAMPLE_MODEL, SAMPLE_MODEL)
    root, hub_id = as_path(source), None
    if not root.exists():
        hub_id = str(source)
        root = _download(hub_id, options, with_vae)
    path = root / (options.subfolder or "")
    if not path.exists():
        raise ValueError(f"checkpoint {str(source)!r} has no folder {options.subfolder!r}")
    return Source(path, root, hub_id)


def transformer_class(path: Path) -> str | None:
    """Name of the class that the config in a folder, or in its `transformer` folder, names; `None` if it names none.

    Of a pipeline with a U-Net, that of the U-Net.
    """
    for config in (path / "transformer" / "config.json", path / "config.json"):
        if config.is_file():
            try:
                name = current_class(read_json(config))
            except (OSError, ValueError, AttributeError) as error:
                raise ValueError(f"{config} cannot be read: {error}") from error
            return name if isinstance(name, str) else None
    return _unet(path / "model_index.json")


def current_class(config: dict[str, Any]) -> Any:
    """The class that a config names, by its name in today's diffusers."""
    name = config.get("_class_name")
    return LEGACY.get(str(config.get("norm_type")), name) if name == "Transformer2DModel" else name


def _unet(index: Path) -> str | None:
    """Name of the class of a pipeline's U-Net; `None` if it has none."""
    try:
        unet = read_json(index).get("unet")
    except (OSError, ValueError, AttributeError):
        return None
    return str(unet[-1]) if isinstance(unet, list) and unet and unet[-1] else None


def _download(repo_id: str, options: LoadingOptions, with_vae: bool) -> Path:
    """Download a checkpoint: first the files that describe it, then the weights that they name."""
    inside = _inside(options)
    texts = dict.fromkeys((f"{inside}README.md", "README.md", *LICENSE_FILES))
    root = _fetch(repo_id, [*(f"{inside}{name}" for name in DESCRIPTIONS), *texts], options)
    pipeline, class_name = (root / inside / "model_index.json").is_file(), transformer_class(root / inside)
    if class_name is not None and class_name not in DIT and not class_name.startswith("Autoencoder"):
        return root
    place = Source(root / inside, root, repo_id)
    if not pipeline:
        fetch_weights(place, "", options)
        return root
    fetch_weights(place, "transformer", options)
    if with_vae:
        fetch_vae(place, options)
    return root


def _inside(options: LoadingOptions) -> str:
    """The folder of the checkpoint in its repository, as the start of a file's name."""
    return f"{options.subfolder.strip('/')}/" if options.subfolder else ""


def _pinned(place: Source, options: LoadingOptions) -> LoadingOptions:
    """The same options, at the commit of the files that are here, even if a new one is pushed."""
    if re.fullmatch("[0-9a-f]{40}", place.root.name):
        return dataclasses.replace(options, revision=place.root.name)
    return options


def fetch_vae(place: Source, options: LoadingOptions) -> None:
    """Download the VAE of a pipeline on the Hub, without the variant if it has none."""
    if (place.path / "vae" / "config.json").is_file():
        fetch_weights(place, "vae", options, dict.fromkeys((options.variant, None)))


def fetch_text_encoders(place: Source, parts: Iterable[str], options: LoadingOptions) -> None:
    """Download text encoders and tokenizers of a pipeline on the Hub; a local one has them already."""
    if place.hub_id is None:
        return
    for part in sorted(parts):
        files = [f"{_inside(options)}{part}/{name}" for name in ("*.json", "*.txt", "*.model")]
        _fetch(place.hub_id, files, _pinned(place, options))
        if part.startswith("text_encoder"):
            fetch_weights(place, part, options, dict.fromkeys((options.variant, None)))


def fetch_weights(
    place: Source,
    part: str,
    options: LoadingOptions,
    variants: Iterable[str | None] | None = None,
    dropped: tuple[str, ...] = (),
) -> None:
    """Download one model's weights from the Hub, in the first format and variant found; a local one has them already.

    Args:
        place: the repository.
        part: folder of the model in it; empty for the checkpoint's own.
        options: loading options.
        variants: variants to look for, in this order (default: that of the options).
        dropped: starts of tensor names. Shards that hold no other tensors are not downloaded.
    """
    if place.hub_id is None:
        return
    options, folder = _pinned(place, options), place.path / part
    start = f"{_inside(options)}{part}/" if part else _inside(options)
    suffixes = ("safetensors", "bin") if options.allow_pickle else ("safetensors",)
    for suffix, variant in itertools.product(suffixes, variants or [options.variant]):
        pairs = file_names(suffix, variant)
        _fetch(place.hub_id, [f"{start}{name}" for pair in pairs for name in pair], options)
        for _, index in pairs:
            if (folder / index).is_file():
                _fetch(place.hub_id, [f"{start}{shard}" for shard in shards_of(folder / index, dropped)], options)
        if any((folder / name).is_file() for pair in pairs for name in pair):
            return


def _fetch(repo_id: str, names: list[str], options: LoadingOptions) -> Path:
    try:
        return Path(snapshot_download(repo_id, allow_patterns=names, **options.hub))
    except GatedRepoError as error:
        raise ValueError(
            f"checkpoint {repo_id!r} is gated: accept its terms at https://huggingface.co/{repo_id}, "
            "then run `hf auth login`"
        ) from error
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"checkpoint {repo_id!r} is neither a local path nor reachable on the Hub ({first_line(error)})"
        ) from error


def detect_format(path: Path) -> str:
    """Detect a checkpoint's format from its files; for a single file, from the words in its name.

    Raises:
        ValueError: the format is unknown, or it holds another type of model.
    """
    if path.is_file():
        return kind_by_name(path.name)
    if (path / "model_index.json").is_file():
        return "diffusers"
    try:
        fields = read_json(path / "config.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint: no readable config.json or model_index.json") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a checkpoint: its config.json holds no fields")
    if fields.get("model_type") in (ASelectDiTConfig.model_type, ASelectDiffusionConfig.model_type):
        return "aselect"
    class_name = current_class(fields)
    if class_name == "DiTTransformer2DModel" or class_name in FAMILIES:
        return "diffusers"
    if class_name and "model_type" not in fields:
        try:
            find_family(class_name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    found = fields.get("model_type") or "unknown"
    raise ValueError(
        f"{path} holds a model of type {found!r}; accepted are aselect_dit, aselect_diffusion, DiTTransformer2DModel, "
        f"{', '.join(FAMILIES)}"
    )


def kind_by_name(name: str) -> str:
    """`"dit"` or `"sit"`, whichever is a whole word of the name ("credit-DiT-S.pt" is a DiT).

    Raises:
        ValueError: the name contains neither word, or both.
    """
    words = set(re.findall("[a-z]+", name.lower()))
    kinds = [kind for kind in ORIGINAL_LICENSES if kind in words]
    if len(kinds) != 1:
        raise ValueError(f"cannot tell whether {name} is a DiT or a SiT: pass source_format='dit' or 'sit'")
    return kinds[0]
