"""`aselect push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aselect_cli.command import Answer


def push(
    folder: Annotated[
        Path,
        typer.Argument(help="Saved model; .json files of select, compare, audit and training in it are pushed, too."),
    ],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, as user/name.")],
    *,
    options: dict[str, Any],
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data set of compare.json.")] = None,
    audit: Annotated[Path | None, typer.Option(help="Audit for the card (default: the folder's audit.json).")] = None,
    license: Annotated[
        str | None, typer.Option(help="License, never a freer one than the base model's (default: the base model's).")
    ] = None,
    examples: Annotated[
        bool | None, typer.Option(help="Push example pictures of the training (default: if their license permits).")
    ] = None,
    accept_base_license: Annotated[
        bool,
        typer.Option(
            "--accept-base-license",
            help="Publish weights whose base model is gated, or has a non-commercial or uncommon license: you have "
            "read it, and it permits this.",
        ),
    ] = False,
    space: Annotated[
        bool, typer.Option("--space", help="Also push a Space of the same name: a page that shows the model.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files and the card; send nothing.")] = False,
) -> Answer:
    """Push a saved model to the Hub with its card, selection, audit, results and endpoint handler, in one commit."""
    from aselect_hf.audit import Audit
    from aselect_hf.hub import push_folder
    from aselect_hf.hub.space import space_files
    from aselect_hf.hub.upload import prepare_folder

    audited = Audit.load(audit) if audit else None
    if dry_run:
        upload = prepare_folder(
            folder, repo_id, dataset=dataset, audit=audited, license=license, examples=bool(examples), space=space
        )
        sizes = upload.sizes()
        if space:
            sizes |= {f"spaces: {path}": len(content) for path, content in space_files(repo_id).items()}
        lines = [f"{size:>14,}  {path}" for path, size in sizes.items()]
        return Answer("\n".join([*lines, "", str(upload.card)]), {"files": sizes, "card": str(upload.card)})
    commit = push_folder(
        *(folder, repo_id),
        dataset=dataset,
        audit=audited,
        license=license,
        examples=examples,
        accept_base_license=accept_base_license,
        space=space,
        **options,
    )
    url = commit.pr_url or commit.commit_url
    shown = f" and its Space spaces/{commit.repo_url.repo_id}" if space else ""
    return Answer(f"pushed {url}{shown}", {"url": url, "commit": commit.oid, "space": space})
