"""Prepare the content of a Hub repository completely before anything is sent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from typing_extensions import TypedDict

from aselect_hf.audit import Audit
from aselect_hf.compare.table import Comparison
from aselect_hf.conversion import DERIVED_KEYS, LICENSE_FILES, detect_format
from aselect_hf.files import as_path, check_types, read_json
from aselect_hf.hub.card import CardContent, TrainingRecord
from aselect_hf.hub.card_sections import TEMPLATES, render_card
from aselect_hf.hub.examples import Examples, load_examples, pictures_of
from aselect_hf.hub.notebook import notebook
from aselect_hf.hub.redaction import without_secrets
from aselect_hf.hub.results import EvaluationResult, eval_result_files, load_results
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.selection import TimestepSelection

Results = Comparison | Sequence[EvaluationResult]

MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "*.py",
    *LICENSE_FILES,
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass
class Upload:
    """Files by path in the repository, each a local path or content. The card is separate, since it may be merged."""

    files: dict[str, Path | bytes]
    card: ModelCard

    def sizes(self) -> dict[str, int]:
        """Bytes by path in the repository, including the card."""
        contents = self.files | {"README.md": str(self.card).encode()}
        return {
            path: content.stat().st_size if isinstance(content, Path) else len(content)
            for path, content in sorted(contents.items())
        }


def prepare_upload(
    folder: str | Path,
    repo_id: str,
    *,
    selection: TimestepSelection | None = None,
    results: Results | None = None,
    comparison: Comparison | None = None,
    dataset: str | None = None,
    training: dict[str, Any] | None = None,
    audit: Audit | None = None,
    license: str | None = None,
    examples: Examples | None = None,
    space: bool = False,
) -> Upload:
    """Gather a saved model and what is known about it; arguments as in `push_to_hub`.

    `results` may be a comparison, or figures, which may have a separate `comparison`. The pictures of `examples` are in
    `folder`. With `space`, the card links to the Space of the same id.

    Raises:
        ValueError: not a saved model of this package, pickled or damaged weights, or a wrong argument.
    """
    folder = as_path(folder)
    files = model_files(folder)
    config = read_config(folder)
    refuse_secrets(folder / "config.json")
    content = CardContent(
        config,
        repo_id,
        architecture=(config.architectures or [config.auto_classes["AutoModel"].rpartition(".")[2]])[0],
        num_parameters=count_parameters(folder, () if config.fixed_timestep else DERIVED_KEYS),
        selection=selection,
        results=[] if results is None or isinstance(results, Comparison) else list(results),
        comparison=results if isinstance(results, Comparison) else comparison,
        dataset=dataset,
        training=training,
        audit=audit,
        license=license,
        files=list(files),
        examples=examples["examples"] if examples else [],
        space=space,
    )
    if examples:
        files |= {name: folder.absolute() / name for name in pictures_of(examples)}
    if content.has_processor:
        files.setdefault("handler.py", TEMPLATES / "handler.py")
        files["notebook.ipynb"] = notebook(content, version("aselect-hf"))
    return Upload(files | record_files(content, renew_selection=selection is not None), render_card(content))


def model_files(folder: Path) -> dict[str, Path | bytes]:
    """The files of a saved model, by name.

    Raises:
        ValueError: not a saved model of this package, or pickled weights.
    """
    if detect_format(folder) != "aselect":
        raise ValueError(f"{folder} is a diffusers checkpoint: convert it first, with `aselect convert`")
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise ValueError(f"{folder} holds pickles, which are never pushed: remove {', '.join(pickles)}")
    return {
        path.name: path.absolute()
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in MODEL_FILES)
    }


def record_files(content: CardContent, renew_selection: bool) -> dict[str, Path | bytes]:
    """The records that the card describes, and their pictures; `selection.json` only with `renew_selection`."""
    files: dict[str, Path | bytes] = {}
    selection, audit, repo_id = content.selection, content.audit, content.repo_id
    if content.training:
        files["training.json"] = json.dumps(content.training, indent=1).encode()
    if selection is not None and renew_selection:
        files["selection.json"] = written(replace(selection, model=repo_id).save, "selection.json")
    if selection is not None and selection.scores:
        files["selection.png"] = written(selection.plot, "selection.png")
    if audit is not None:
        renamed = {name: replace(each, model=repo_id) for name, each in audit.selections.items()}
        files["audit.json"] = written(replace(audit, selections=renamed).save, "audit.json")
        files["audit.png"] = written(audit.plot, "audit.png")
    return files | {path: text.encode() for path, text in eval_result_files(content.results).items()}


def prepare_folder(
    folder: str | Path,
    repo_id: str,
    *,
    dataset: str | None,
    license: str | None,
    audit: Audit | None = None,
    examples: bool = True,
    space: bool = False,
) -> Upload:
    """`prepare_upload` with the `selection`, `compare`, `results`, `training` and `audit` `.json` in the folder.

    An `audit` replaces the folder's. With `examples`, the pictures of its `widget.json` are included.
    """
    folder = as_path(folder)
    selection, comparison, results, record, audited = (
        folder / f"{name}.json" for name in ("selection", "compare", "results", "training", "audit")
    )
    if audit is None and audited.is_file():
        audit = Audit.load(audited)
    try:
        training = read_json(record) if record.is_file() else None
        if training is not None:
            check_types(training, TrainingRecord)
    except ValueError as error:
        raise ValueError(f"{record} is not a training record ({error})") from error
    return prepare_upload(
        folder,
        repo_id,
        selection=TimestepSelection.load(selection) if selection.is_file() else None,
        results=load_results(results) if results.is_file() else None,
        comparison=Comparison.load(comparison) if comparison.is_file() else None,
        dataset=dataset,
        training=training,
        audit=audit,
        license=license,
        examples=load_examples(folder) if examples else None,
        space=space,
    )


class ConfigFile(TypedDict, total=False):
    """Fields of `config.json` that transformers reads without checking their types."""

    architectures: list[str] | None
    id2label: dict[str, str] | None
    label2id: dict[str, int] | None


def read_config(folder: Path) -> NoisyBackboneConfig:
    """The config of a saved model, read without running its code.

    Raises:
        ValueError: a field has the wrong type or an impossible value.
    """
    try:
        check_types(read_json(folder / "config.json"), ConfigFile)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if isinstance(config, NoisyBackboneConfig):
            return config
        raise ValueError(f"model_type {config.model_type!r} belongs to another package")
    except (StrictDataclassError, TypeError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines())
        raise ValueError(f"{folder / 'config.json'} does not describe a model of this package: {reason}") from error


def refuse_secrets(path: Path) -> None:
    """Refuse a file of the model, which is pushed unchanged, if a field looks like a token or password."""
    fields = read_json(path)
    kept = without_secrets(fields)
    if found := [name for name, value in fields.items() if kept.get(name) != value]:
        raise ValueError(f"{path} holds what looks like a secret in {', '.join(found)}: remove it, then push")


def count_parameters(folder: Path, buffers: Iterable[str]) -> int:
    """Parameters in the weight files, without the named `buffers` that the checkpoint also stores.

    Raises:
        ValueError: there are no weights, or they are damaged.
    """
    count = 0
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if not name.endswith(tuple(buffers)):
                        count += math.prod(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"weights {path} cannot be read: {error}") from error
    if not count:
        raise ValueError(f"{folder} holds no weights: model.safetensors is missing")
    return count


def written(save: Any, name: str) -> bytes:
    with TemporaryDirectory() as folder:
        return Path(save(Path(folder) / name)).read_bytes()
