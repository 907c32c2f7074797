"""The model of a pretraining run as it was at one of its checkpoints (its weight average), to be measured as a pair.

python -m benchmarks.selection.earlier ROOT/cifar10-dit ROOT/cifar10-dit/checkpoint-1841 ROOT/cifar10-dit-short
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from aselect_hf.conversion import load_model, save_model
from aselect_hf.files import atomic_directory


def extract(finished: Path, checkpoint: Path, output_dir: Path) -> None:
    """Write the checkpoint's average into a model with the finished run's config."""
    model = load_model(finished)
    average = EMAModel(model.parameters())
    average.load_state_dict(torch.load(checkpoint / "custom_checkpoint_1.pkl", weights_only=True))
    average.copy_to(model.parameters())
    with atomic_directory(output_dir) as folder:
        save_model(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("finished", type=Path, help="output folder of the run")
    parser.add_argument("checkpoint", type=Path, help="one of its checkpoints")
    parser.add_argument("output_dir", type=Path)
    extract(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
