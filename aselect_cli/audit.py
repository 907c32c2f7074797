"""`aselect audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aselect_cli import options as opt
from aselect_cli.command import Answer, command_line

EXIT_CODES = {"any timestep": 0, "trust": 0, "uncertain": 3, "do not trust": 4}  # 2 is a mistake, 1 a crash


def audit(
    model: opt.Model,
    data: opt.Data,
    *,
    options: dict[str, Any],
    method: opt.Method = "auto",
    selection: Annotated[
        Path | None, typer.Option(help="Audit the timestep of this selection.json instead of a rule's.")
    ] = None,
    feature: opt.FeatureOrAuto = None,
    timesteps: opt.Timesteps = None,
    num_images: Annotated[
        int | None,
        typer.Option(help="Random images for each rule (default: the rule's own; 1000 for the probe that checks)."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Points of the probe's score that the pick may lose.")] = 2.0,
    pool_size: opt.PoolSize = 1,
    split: Annotated[str, typer.Option(help="Split to check on.")] = "train",
    held_out_split: Annotated[
        str | None,
        typer.Option(
            help="Split of images that the model was not trained on, to look for memorized ones (default: none)."
        ),
    ] = None,
    image_column: opt.ImageColumn = "image",
    label_column: opt.LabelColumn = None,
    seed: opt.Seed = 0,
    batch_size: opt.AutoBatchSize = None,
    device: opt.Device = None,
    dtype: opt.DType = "float32",
    on_error: opt.OnError = "stop",
    output_dir: opt.OutputDir = Path("runs/audit"),
    report: opt.Report = None,
    cache_dir: opt.CacheDir = None,
) -> Answer:
    """Check the timestep of a rule, of a saved selection, or a guess; write `audit.json` and `audit.png`.

    With labels, a small probe is trained at every timestep. Without labels, the pick is compared with that of an
    independent rule. To audit a guess, use --method fixed --timestep 50.

    Exit codes: 0 trust or any timestep, 3 uncertain, 4 do not trust, 2 a mistake in the command.
    """
    from aselect_cli.inputs import load_backbone, read_images
    from aselect_hf.audit import audit_timestep
    from aselect_hf.data.processes import shared_work
    from aselect_hf.data.sources import refuse_shared_splits
    from aselect_hf.files import atomic_files, check_writable, read_json
    from aselect_hf.report import write_report
    from aselect_hf.selection import TimestepSelection
    from aselect_hf.selection.candidates import read_candidates
    from aselect_hf.selection.request import check_request

    check_request(method, options, feature)
    check_writable(output_dir / "audit.json")
    if report:
        check_writable(report)
    refuse_shared_splits({"split": split} | ({"held_out_split": held_out_split} if held_out_split else {}))
    made = TimestepSelection.load(selection) if selection else None
    candidates = read_candidates(timesteps)
    backbone = load_backbone(model, device, dtype)
    held_out = read_images(data, held_out_split, image_column, label_column) if held_out_split else None
    images = read_images(data, split, image_column, label_column)
    with shared_work() as here:
        result = audit_timestep(
            backbone,
            images,
            held_out=held_out,
            method=method,
            selection=made,
            feature=feature,
            timesteps=candidates,
            num_images=num_images,
            tolerance=tolerance,
            pool_size=pool_size,
            seed=seed,
            batch_size=batch_size,
            on_error=on_error,
            cache_dir=cache_dir,
            progress=here.is_main,
            **options,
        )
    if not here.is_main:
        return Answer.silent(EXIT_CODES[result.verdict])
    with atomic_files(output_dir) as folder:
        result.save(folder / "audit.json")
        result.plot(folder / "audit.png")
    if report:
        write_report(report, result, backbone, images.readable(on_error), command=command_line())
    written = [str(path) for path in (output_dir / "audit.json", output_dir / "audit.png", report) if path]
    text = f"{result.picked.describe()}\n{result.describe()}\nwrote {', '.join(written)}"
    return Answer(text, read_json(written[0]) | {"written": written}, EXIT_CODES[result.verdict])
