"""Train a semantic segmenter on a DiT at a timestep that `--method` chooses.

A frozen backbone and many heads at once (offline; the model and images ship with the package):

    accelerate launch -m aselect_hf.training.segment --model_name_or_path sample --dataset_name sample \\
        --validation_split validation --test_split test --freeze_backbone --method hfr \\
        --num_train_epochs 10 --output_dir runs/segment

The whole model, with the gate and both losses, on several GPUs:

    accelerate launch --config_file aselect_hf/training/configs/multi_gpu.yaml -m aselect_hf.training.segment \\
        --model_name_or_path you/dit-xl-2 --train_dir photos/train --validation_dir photos/validation \\
        --segmentation_head upernet --method gate --mixed_precision bf16 --output_dir runs/photos

Arguments may come from a YAML or JSON file, named first. A finished run saves its own in `training_args.json`.
"""

from __future__ import annotations

from aselect_hf.errors import one_line_errors
from aselect_hf.tasks import SEGMENTATION
from aselect_hf.training.arguments import TaskDataArguments, TaskModelArguments, TrainingArguments
from aselect_hf.training.parsing import parse_arguments
from aselect_hf.training.task import TaskRun


def main() -> None:
    with one_line_errors("segment"):
        arguments = parse_arguments((TaskModelArguments, TaskDataArguments, TrainingArguments), __doc__)
        TaskRun(SEGMENTATION, *arguments).run()


if __name__ == "__main__":
    main()
