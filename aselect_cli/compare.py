"""`aselect compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from aselect_cli import options as opt
from aselect_cli.command import Answer, command_line
from aselect_cli.rules import complete_rules


def compare(
    model: opt.Model,
    data: opt.Data,
    *,
    options: dict[str, Any],
    methods: Annotated[
        str,
        typer.Option(
            help="Rules to compare, separated by commas; all rules are listed below.", autocompletion=complete_rules
        ),
    ] = "hfr,grid,fixed",
    feature: opt.Feature = None,
    timesteps: opt.Timesteps = None,
    num_images: opt.NumImages = None,
    probe: Annotated[str, typer.Option(help="Probe that scores a timestep: linear, knn or ridge.")] = "linear",
    pool_size: opt.PoolSize = 1,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Vision encoder to put under the same probe: a folder, a Hub id, or id@revision. May be repeated."
        ),
    ] = None,
    num_seeds: Annotated[int, typer.Option(help="Probes per rule, each on another 80 % of the training split.")] = 3,
    train_split: Annotated[str, typer.Option(help="Split to train probes on.")] = "train",
    validation_split: Annotated[str, typer.Option(help="Split to choose on.")] = "validation",
    test_split: Annotated[str, typer.Option(help="Split to report accuracy on.")] = "test",
    image_column: opt.ImageColumn = "image",
    label_column: opt.LabelColumn = None,
    max_samples: opt.MaxSamples = None,
    seed: opt.Seed = 0,
    batch_size: opt.AutoBatchSize = None,
    device: opt.Device = None,
    dtype: opt.DType = "float32",
    on_error: opt.OnError = "stop",
    output_dir: opt.OutputDir = Path("runs/compare"),
    report: opt.Report = None,
    cache_dir: opt.CacheDir = None,
) -> Answer:
    """Compare rules on the same images: timestep, test accuracy and cost; write a table and a picture.

    Each option of rules applies to all compared rules that have it.
    """
    from aselect_cli.inputs import load_backbone, read_images
    from aselect_hf.compare import check_strategies, compare_strategies, conclude, options_by_rule
    from aselect_hf.data.processes import shared_work
    from aselect_hf.data.sources import refuse_shared_splits
    from aselect_hf.data.splits import share_classes
    from aselect_hf.files import check_writable, read_json
    from aselect_hf.report import write_report
    from aselect_hf.selection.candidates import read_candidates

    rules = [name.strip() for name in methods.split(",")]
    shared = options_by_rule(rules, options)
    check_strategies(rules, shared, feature)
    names = {"train": train_split, "validation": validation_split, "test": test_split}
    refuse_shared_splits({f"{name}_split": split for name, split in names.items()})
    check_writable(output_dir / "compare.json")
    if report:
        check_writable(report)
    candidates = read_candidates(timesteps)
    backbone = load_backbone(model, device, dtype)
    splits = {name: read_images(data, split, image_column, label_column) for name, split in names.items()}
    sampled = {
        name: each.sample(max_samples, seed, per_class=1).readable(on_error)
        for name, each in share_classes(splits).items()
    }
    with shared_work() as here:
        comparison = compare_strategies(
            backbone,
            sampled,
            strategies=rules,
            feature=feature,
            strategy_options=shared,
            timesteps=candidates,
            num_images=num_images,
            seed=seed,
            num_seeds=num_seeds,
            probe=probe,
            pool_size=pool_size,
            batch_size=batch_size,
            cache_dir=cache_dir,
            baselines=baseline or [],
            progress=here.is_main,
        )
    if not here.is_main:
        return Answer.silent()
    comparison.save(output_dir)
    if report:
        write_report(report, comparison, backbone, sampled["test"], command=command_line())
    audited = ", audit.json, audit.png" if comparison.audit else ""
    described = ["--feature", feature] if feature else []
    described += ["--pool-size", str(pool_size)] if pool_size != 1 else []
    lines = [
        *map(_for_terminal, comparison.rich_tables()),
        *comparison.summary(),
        f"wrote {output_dir}: compare.json, compare.md, compare.png{audited} and every selection",
        *([f"wrote {report}"] if report else []),
        "",
        *conclude(comparison),
        f"The picture: {output_dir / 'compare.png'}",
        f"Next: {shlex.join(['aselect', 'select', model, data, *described, '--save-model', 'runs/model'])}",
    ]
    written = [str(path) for path in (output_dir, report) if path]
    return Answer("\n".join(lines), read_json(output_dir / "compare.json") | {"written": written})


def _for_terminal(table: Any) -> str:
    """A table as the terminal shows it."""
    from rich.console import Console

    console = Console()
    with console.capture() as captured:
        console.print(table, end="")
    return captured.get().rstrip("\n")
