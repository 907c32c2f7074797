"""The command line, `aselect`: each command is a thin shell over a function of the same name in the library."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
import typer
from rich.console import Console
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.utils import logging

from aselect_hf.audit import DO_NOT_TRUST, TOLERANCE, TRUST, UNCERTAIN, Audit, audit_timestep
from aselect_hf.compare.run import check_strategies, compare_strategies
from aselect_hf.conversion import convert_checkpoint, load_model
from aselect_hf.conversion import save_model as write_model
from aselect_hf.cost import weight_bytes
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images, refuse_shared_splits
from aselect_hf.data.splits import share_classes
from aselect_hf.errors import one_line_errors
from aselect_hf.files import (
    as_path,
    atomic_directory,
    atomic_file,
    atomic_files,
    check_absent,
    check_writable,
    reserved_space,
)
from aselect_hf.hub import push_folder
from aselect_hf.hub.upload import prepare_folder
from aselect_hf.modeling.features import list_features
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.selection import RULES, TimestepSelection, select_timestep
from aselect_hf.selection.request import check_request
from aselect_hf.selection.rule import WITH_LABELS, WITHOUT_LABELS
from aselect_hf.speed import MAX_ROUNDS, MAX_SECONDS, benchmark_model
from aselect_hf.versions import slow_precision

TRAIN_SPLIT = "train"
EXIT_CODES = {TRUST: 0, UNCERTAIN: 3, DO_NOT_TRUST: 4}  # of audit; 2 is a mistake's, 1 a crash's

app = typer.Typer(
    help="Diffusion Transformers as vision backbones, at the timestep their own features choose.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Checkpoint: a folder, a Hub id, or 'sample' (ships with the package).")]
Data = Annotated[str, typer.Argument(help="Images: a folder, a Hub data set, or 'sample' (ships with the package).")]
Feature = Annotated[str | None, typer.Option(help="`blocks.<i>.<kind>`; default: the model's own.")]
FeatureOrAuto = Annotated[str | None, typer.Option(help="As blocks.4.query, or auto; default: the model's own.")]
Method = Annotated[
    str,
    typer.Option(
        help=f"The rule that picks: auto (labels: {WITH_LABELS}; none: {WITHOUT_LABELS}), {', '.join(RULES)}."
    ),
]
FixedTimestep = Annotated[int | None, typer.Option(help="fixed: the timestep.")]
Timesteps = Annotated[
    str | None, typer.Option(help="Candidates '0,50,100', or how many of the default ones (20; gate: 16).")
]
NumImages = Annotated[
    int | None, typer.Option(help="Random images to look at; default: hfr 64, label-free criteria 256, few labels 500.")
]
MaxSamples = Annotated[
    int | None, typer.Option("--max-samples", "--max_samples", help="Use a random sample of at most this many images.")
]
Seed = Annotated[int, typer.Option(help="Seed of the image sample and of the noise.")]
BatchSize = Annotated[int, typer.Option(help="Forward passes run at once.")]
AutoBatchSize = Annotated[
    int | None, typer.Option(help="Forward passes run at once; default: 64, for hfr on an accelerator what fits.")
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; default: what there is.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
OnError = Annotated[str, typer.Option(help="At an unreadable image: 'stop', or 'skip' it.")]
ImageColumn = Annotated[str, typer.Option(help="Column with the images.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column with the labels (default: label, if there is one).")]
OutputDir = Annotated[Path, typer.Option(help="Where to write.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where to keep pooled features.")]


@app.command(epilog="Example: `aselect select sample sample --output-dir runs/select --save-model runs/model`")
def select(
    model: Model,
    data: Data,
    method: Method = "auto",
    feature: FeatureOrAuto = None,
    timesteps: Timesteps = None,
    num_images: NumImages = None,
    split: Annotated[str, typer.Option(help="Split to choose on.")] = "train",
    image_column: ImageColumn = "image",
    label_column: LabelColumn = None,
    noise_correction: Annotated[
        bool | None,
        typer.Option("--noise-correction/--no-noise-correction", help="hfr: subtract the HFR of pure noise (default)."),
    ] = None,
    cutoff: Annotated[
        float | None, typer.Option(help="hfr: cycles per token above which a frequency is high (default: 0.15).")
    ] = None,
    dims: Annotated[
        int | None, typer.Option(help="hfr: 2 for the patch grid (default), 1 for the token sequence.")
    ] = None,
    spectrum: Annotated[str | None, typer.Option(help="hfr: power (default) or amplitude.")] = None,
    search: Annotated[
        str | None, typer.Option(help="hfr: full (default), or coarse_to_fine, which scores fewer timesteps.")
    ] = None,
    early_stopping: Annotated[
        float | None, typer.Option(help="hfr: accepted probability of a worse timestep (0.05); fewer images are run.")
    ] = None,
    timestep: FixedTimestep = None,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    batch_size: AutoBatchSize = None,
    device: Device = None,
    dtype: DType = "float32",
    on_error: OnError = "stop",
    output_dir: OutputDir = Path("runs/select"),
    save_model: Annotated[Path | None, typer.Option(help="Also write the model, with the timestep chosen.")] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Choose the timestep: writes `selection.json` and `selection.png`."""
    options = _given(
        noise_correction=noise_correction, cutoff=cutoff, dims=dims, spectrum=spectrum, search=search,
        early_stopping=early_stopping, timestep=timestep,
    )  # fmt: skip
    check_request(method, options, feature)
    check_writable(output_dir / "selection.json")
    if save_model:
        check_absent(save_model)
    backbone = _load(model, device, dtype)
    images = _images(data, split, image_column, label_column).sample(max_samples, seed, per_class=2).readable(on_error)
    with _room_for_model(save_model, backbone):
        selection = select_timestep(
            backbone, images, method=method, feature=feature, timesteps=_timesteps(timesteps), num_images=num_images,
            seed=seed, batch_size=batch_size, cache_dir=cache_dir, **options,
        )  # fmt: skip
    with atomic_files(output_dir) as folder:
        selection.save(folder / "selection.json")
        selection.plot(folder / "selection.png")
    if save_model:
        with atomic_directory(save_model) as folder:
            write_model(selection.apply(backbone), folder)
    cost = selection.cost
    print(selection.describe())
    print(f"{cost.forward_passes:,} forward passes, {cost.seconds:.1f} s, {cost.flops / 1e9:,.1f} GFLOP")
    saved = f", {save_model}" if save_model else ""
    print(f"wrote {output_dir / 'selection.json'}, {output_dir / 'selection.png'}{saved}")


@app.command(epilog="Example: `aselect audit sample sample --output-dir runs/audit`")
def audit(
    model: Model,
    data: Data,
    method: Method = "auto",
    selection: Annotated[Path | None, typer.Option(help="A selection.json, whose pick is audited instead.")] = None,
    timestep: FixedTimestep = None,
    feature: FeatureOrAuto = None,
    timesteps: Timesteps = None,
    num_images: Annotated[
        int | None, typer.Option(help="Random images for every rule; default: the method's, and 1000 for the probe.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Points of the probe that the pick may lose.")] = TOLERANCE,
    pool_size: Annotated[
        int, typer.Option(help="Average tokens over an N x N grid of cells (1: one mean over all tokens).")
    ] = 1,
    split: Annotated[str, typer.Option(help="Split to look at.")] = "train",
    image_column: ImageColumn = "image",
    label_column: LabelColumn = None,
    seed: Seed = 0,
    batch_size: AutoBatchSize = None,
    device: Device = None,
    dtype: DType = "float32",
    on_error: OnError = "stop",
    output_dir: OutputDir = Path("runs/audit"),
    cache_dir: CacheDir = None,
) -> None:
    """Check the timestep of a rule, a saved selection or a guess: writes `audit.json` and `audit.png`.

    Labels, where there are any, train a small probe at every timestep; without, another label-free rule is asked.
    Exit code: 0 trust, 3 uncertain, 4 do not trust; 2 for a mistake.
    """
    options = _given(timestep=timestep)
    check_request(method, options, feature)
    check_writable(output_dir / "audit.json")
    made = TimestepSelection.load(selection) if selection else None
    backbone = _load(model, device, dtype)
    images = _images(data, split, image_column, label_column)
    result = audit_timestep(
        backbone, images, method=method, selection=made, feature=feature, timesteps=_timesteps(timesteps),
        num_images=num_images, tolerance=tolerance, pool_size=pool_size, seed=seed, batch_size=batch_size,
        on_error=on_error, cache_dir=cache_dir, **options,
    )  # fmt: skip
    with atomic_files(output_dir) as folder:
        result.save(folder / "audit.json")
        result.plot(folder / "audit.png")
    print(result.picked.describe())
    print(result.describe())
    print(f"wrote {output_dir / 'audit.json'}, {output_dir / 'audit.png'}")
    raise typer.Exit(EXIT_CODES[result.verdict])


@app.command(epilog="Example: `aselect compare sample sample --strategies hfr,grid,fixed --output-dir runs/compare`")
def compare(
    model: Model,
    data: Data,
    strategies: Annotated[str, typer.Option(help="Names, separated by commas.")] = "hfr,grid,fixed",
    feature: Feature = None,
    timesteps: Timesteps = None,
    num_images: NumImages = None,
    fixed_timestep: Annotated[int | None, typer.Option(help="For 'fixed'; default a tenth of the schedule.")] = None,
    probe: Annotated[str, typer.Option(help="linear or knn.")] = "linear",
    pool_size: Annotated[
        int, typer.Option(help="Average tokens over an N x N grid of cells (1: one mean over all tokens).")
    ] = 1,
    num_seeds: Annotated[int, typer.Option(help="Probes per strategy.")] = 3,
    train_split: Annotated[str, typer.Option(help="Split to train probes on.")] = "train",
    validation_split: Annotated[str, typer.Option(help="Split to choose on.")] = "validation",
    test_split: Annotated[str, typer.Option(help="Split to report on.")] = "test",
    image_column: ImageColumn = "image",
    label_column: LabelColumn = None,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    batch_size: AutoBatchSize = None,
    device: Device = None,
    dtype: DType = "float32",
    on_error: OnError = "stop",
    output_dir: OutputDir = Path("runs/compare"),
    cache_dir: CacheDir = None,
) -> None:
    """Strategies side by side: timestep, test accuracy and cost; writes a table and a picture."""
    rules = [name.strip() for name in strategies.split(",")]
    options = {"fixed": {"timestep": fixed_timestep}} if fixed_timestep is not None else {}
    check_strategies(rules, options, feature)
    names = {"train": train_split, "validation": validation_split, "test": test_split}
    refuse_shared_splits({f"{name}_split": split for name, split in names.items()})
    check_writable(output_dir / "compare.json")
    backbone = _load(model, device, dtype)
    splits = share_classes({name: _images(data, split, image_column, label_column) for name, split in names.items()})
    splits = {name: each.sample(max_samples, seed, per_class=1).readable(on_error) for name, each in splits.items()}
    comparison = compare_strategies(
        backbone, splits, strategies=rules, feature=feature, strategy_options=options,
        timesteps=_timesteps(timesteps), num_images=num_images, seed=seed, num_seeds=num_seeds, probe=probe,
        pool_size=pool_size, batch_size=batch_size, cache_dir=cache_dir,
    )  # fmt: skip
    comparison.save(output_dir)
    Console().print(comparison.rich_table())
    print("\n".join(comparison.summary()))
    audited = ", audit.json, audit.png" if comparison.audit else ""
    print(f"wrote {output_dir}: compare.json, compare.md, compare.png{audited} and every selection")


@app.command(epilog="Example: `aselect features sample --list`")
def features(
    model: Model,
    data: Annotated[str | None, typer.Argument(help="Images, as for 'select'; not needed with --list.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print names and shapes of all features.")] = False,
    names: Annotated[str | None, typer.Option("--features", help="Names, separated by commas.")] = None,
    timesteps: Annotated[str | None, typer.Option(help="'0,50,100'; default: the model's own.")] = None,
    pool: Annotated[bool, typer.Option(help="Token mean instead of all tokens.")] = True,
    split: Annotated[str, typer.Option(help="Split to read.")] = "train",
    image_column: ImageColumn = "image",
    label_column: LabelColumn = None,
    max_samples: MaxSamples = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: DType = "float32",
    on_error: OnError = "stop",
    output: Annotated[Path, typer.Option(help="Safetensors file to write.")] = Path("features.safetensors"),
) -> None:
    """Extract features to a safetensors file, or list them.

    The file also holds the `labels` (-1: none); its metadata hold the names of the classes as JSON, `label_names`. A
    class has the same number as in the training split.
    """
    backbone = _load(model, device, dtype)
    config = backbone.config
    if list_only:
        shape = f"(batch, {config.num_patches}, {config.hidden_size})"
        for name in config.fixed_to["features"] if config.fixed_to else list_features(config.num_hidden_layers):
            print(f"{name:28s} {shape}" + ("  <- config.feature" if name == config.feature else ""))
        return
    if data is None:
        raise ValueError("DATA is missing: give images, or --list")
    check_writable(output)
    images = _images(data, split, image_column, label_column).sample(max_samples, 0).readable(on_error)
    if images.label_names is not None and split != TRAIN_SPLIT:
        images = images.with_classes(_names_from_training(images, data, image_column, label_column))
    parts: dict[str, list[Any]] = {}
    with contextlib.ExitStack() as room:
        for batch in tqdm(images.batches(config, batch_size), total=-(-len(images) // batch_size), unit="batch"):
            extracted = backbone.extract_features(
                batch.to(backbone.device),
                features=names.split(",") if names else None,
                timesteps=_timestep_list(timesteps),
                output_format="pooled" if pool else "tokens",
            )
            if not parts:
                needed = len(images) * sum(value[0].nbytes for value in extracted.values())
                room.enter_context(reserved_space(as_path(output).parent, needed, "these features"))
            for name, value in extracted.items():
                parts.setdefault(name, []).append(value.cpu())
    tensors = {name: torch.cat(value) for name, value in parts.items()}
    metadata: dict[str, str] = {}
    if images.labels is None:
        print(f"no labels are written: {images.no_labels}")
    else:
        tensors["labels"] = torch.from_numpy(images.labels)
        metadata["label_names"] = json.dumps(images.label_names)  # null: the labels are integers of the data set's own
    with atomic_file(output) as temporary:
        save_file(tensors, temporary, metadata)
    for name, value in tensors.items():
        print(f"{name:28s} {tuple(value.shape)}")
    print(f"wrote {output}")


@app.command(epilog="Example: `aselect convert facebook/DiT-XL-2-256 dit-xl-2-256`")
def convert(
    source: Annotated[str, typer.Argument(help="diffusers folder or Hub id, DiT or SiT file, or our own checkpoint.")],
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    to: Annotated[Literal["aselect", "diffusers"], typer.Option(help="Format to write.")] = "aselect",
    source_format: Annotated[
        Literal["auto", "aselect", "diffusers", "dit", "sit"], typer.Option(help="Format to read.")
    ] = "auto",
    vae: Annotated[str | None, typer.Option(help="VAE to put inside: folder or Hub id.")] = None,
    vae_decoder: Annotated[bool, typer.Option(help="Keep the VAE's decoder.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .pt and .bin (weights only).")] = False,
    num_attention_heads: Annotated[int | None, typer.Option(help="For a .pt of an unpublished width.")] = None,
    num_condition_classes: Annotated[
        int | None, typer.Option(help="For a .pt: classes it was trained on, without the null class.")
    ] = None,
    model_time: Annotated[
        str | None,
        typer.Option(
            help="For a SiT file: what its network is told, data_fraction (SiT) or noise_fraction (REPA, SRA)."
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder of the checkpoint inside SOURCE.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision to write (default: that of the weights).")] = None,
    fix_timestep: Annotated[
        bool, typer.Option("--fix-timestep", help="Fold the timestep into the weights: a plain, smaller ViT.")
    ] = False,
    timestep: Annotated[int | None, typer.Option(help="Timestep to write; default: the model's own.")] = None,
    feature: Feature = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id the weights come from, for the card.")] = None,
    base_model_license: Annotated[str | None, typer.Option(help="Its license, for the card.")] = None,
) -> None:
    """Convert a checkpoint from or to diffusers, from an original DiT or SiT file, or to a fixed timestep."""
    keywords: dict[str, Any] = {
        "timestep": timestep,
        "feature": feature,
        "num_attention_heads": num_attention_heads,
        "num_condition_classes": num_condition_classes,
        "variant": variant,
        "subfolder": subfolder,
        "revision": revision,
        "dtype": dtype,
        "base_model": base_model,
        "base_model_license": base_model_license,
    }
    model = convert_checkpoint(
        source, output_dir, to=to, source_format=source_format, vae=vae, vae_decoder=vae_decoder,
        allow_pickle=allow_pickle, fix_timestep=fix_timestep, model_time=model_time,
        **{name: value for name, value in keywords.items() if value is not None},
    )  # fmt: skip
    print(f"wrote {output_dir}: {model.num_parameters() / 1e6:.1f} M parameters as {to}")


@app.command(epilog="Example: `aselect benchmark sample --batch_sizes 1,8 --output runs/benchmark.json`")
def benchmark(
    model: Model,
    feature: Annotated[str | None, typer.Option(help="`blocks.<i>.<kind>`; default: half of the depth.")] = None,
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", "--batch_sizes", help="Separated by commas.")] = "1,8,64",
    pixels: Annotated[bool, typer.Option(help="Also from pixels, where the model has a VAE.")] = True,
    rounds: Annotated[int, typer.Option(help="Runs of every contender at a batch size, at most.")] = MAX_ROUNDS,
    max_seconds: Annotated[
        float,
        typer.Option("--max-seconds", "--max_seconds", help="Time per batch size; longer: skipped."),
    ] = MAX_SECONDS,
    device: Device = None,
    dtype: DType = "float32",
    output: Annotated[Path, typer.Option(help="File to write; the table goes beside it, as .md.")] = Path(
        "benchmark.json"
    ),
) -> None:
    """Images per second and memory: your model as it is and fixed, against diffusers and a plain ViT of its size."""
    check_writable(output)
    backbone = _load(model, device, dtype)
    result = benchmark_model(
        backbone, name=Path(model).name, feature=feature, batch_sizes=_integers(batch_sizes, "batch_sizes"),
        pixels=pixels, rounds=rounds, max_seconds=max_seconds,
    )  # fmt: skip
    result.save(output)
    print(result.markdown())
    print(f"wrote {output}, {output.with_suffix('.md')}")


@app.command(epilog="Example: `aselect push runs/model me/my-dit --private --tag v1.0`")
def push(
    folder: Annotated[
        Path, typer.Argument(help="Saved model; its selection, compare, audit and training .json go along.")
    ],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: user/name.")],
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag for the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created where missing.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data set of compare.json.")] = None,
    audit: Annotated[Path | None, typer.Option(help="An audit.json for the card; default the folder's.")] = None,
    license: Annotated[str | None, typer.Option(help="Default the base model's; never a freer one.")] = None,
    examples: Annotated[
        bool | None, typer.Option(help="Push the training's example pictures (default: if their license permits).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print files and card, send nothing.")] = False,
) -> None:
    """Push a saved model to the Hub with its card, selection, audit, results and endpoint handler, in one commit."""
    audited = Audit.load(audit) if audit else None
    if dry_run:
        upload = prepare_folder(
            folder, repo_id, dataset=dataset, audit=audited, license=license, examples=bool(examples)
        )
        for path, size in upload.sizes().items():
            print(f"{size:>14,}  {path}")
        print(f"\n{upload.card}")
        return
    commit = push_folder(
        folder, repo_id, dataset=dataset, audit=audited, license=license, private=private, revision=revision, tag=tag,
        create_pr=create_pr, commit_message=commit_message, examples=examples,
    )  # fmt: skip
    print(f"pushed {commit.pr_url or commit.commit_url}")


def main() -> None:
    """Entry point: a user's mistake ends in one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with one_line_errors("aselect"):
        app()


def _load(model: str, device: str | None, dtype: str) -> ASelectDiTModel:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}; got {dtype!r}")
    logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it warns about every cast
    place = torch.device(device or _default_device())
    if warning := slow_precision(place, dtype, "--dtype float32"):
        print(f"warning: {warning}", file=sys.stderr)
    backbone: Any = load_model(model, dtype=dtypes[dtype])
    return backbone.to(place).eval()


def _room_for_model(save_model: Path | None, model: ASelectDiTModel) -> contextlib.AbstractContextManager[None]:
    """Room for the model that is written at the end."""
    if save_model is None:
        return contextlib.nullcontext()
    return reserved_space(as_path(save_model).parent, weight_bytes(model), "the model's weights")


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _images(data: str, split: str, image_column: str, label_column: str | None) -> ImageData:
    dataset = load_images(data, split)
    return ImageData.of(dataset, image_column=image_column, label_column=label_column, name=f"{data} ({split})")


def _names_from_training(images: ImageData, data: str, image_column: str, label_column: str | None) -> list[str]:
    """Classes of the training split, if there is one, then those that only `images` have."""
    try:
        training = _images(data, TRAIN_SPLIT, image_column, label_column).class_names
    except ValueError:
        return images.class_names
    return [*training, *(name for name in images.class_names if name not in set(training))]


def _given(**options: Any) -> dict[str, Any]:
    """The options of a rule that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _timestep_list(text: str | None) -> list[int] | None:
    return None if text is None else _integers(text, "timesteps")


def _integers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be integers such as '0,50,100'; got {text!r}") from None


def _timesteps(text: str | None) -> list[int] | int | None:
    """Candidates, or how many of the default ones."""
    values = _timestep_list(text)
    return values[0] if values and len(values) == 1 else values


if __name__ == "__main__":
    main()
