"""What every script does last, where it is asked to."""

from __future__ import annotations

from aselect_hf.hub import push_folder
from aselect_hf.training.arguments import PretrainingArguments, TrainingArguments


def push_output(args: PretrainingArguments) -> None:
    """Push `output_dir` with its card and records, if `push_to_hub`; called by one process."""
    if not args.push_to_hub:
        return
    commit = push_folder(
        args.output_dir,
        args.repo_id,
        private=args.hub_private_repo or None,
        token=args.hub_token,
        examples=args.push_examples if isinstance(args, TrainingArguments) else None,
    )
    print(f"pushed {commit.pr_url or commit.commit_url}")
