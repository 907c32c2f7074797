"""The last step of every script: pushing its output."""

from __future__ import annotations

from aselect_hf.hub import push_folder
from aselect_hf.hub.licenses import check_base_license
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.training.arguments import PushArguments


def check_push(args: PushArguments, config: NoisyBackboneConfig) -> None:
    """Refuse, before a training, what `push_output` would refuse after it.

    Raises:
        ValueError: the license of the base model needs to be accepted.
    """
    if args.push_to_hub:
        check_base_license(config, args.accept_base_license)


def push_output(args: PushArguments) -> None:
    """Push `output_dir` with its card and records if `push_to_hub` is set. One process calls this."""
    if args.push_to_hub:
        commit = push_folder(args.output_dir, **args.push_options)
        print(f"pushed {commit.pr_url or commit.commit_url}")
