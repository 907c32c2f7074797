"""The last step of every script: pushing its output."""

from __future__ import annotations

from aselect_hf.hub import push_folder
from aselect_hf.training.arguments import PushArguments


def push_output(args: PushArguments) -> None:
    """Push `output_dir` with its card and records if `push_to_hub` is set. One process calls this."""
    if args.push_to_hub:
        commit = push_folder(args.output_dir, **args.push_options)
        print(f"pushed {commit.pr_url or commit.commit_url}")
