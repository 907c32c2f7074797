"""Train an image classifier on a DiT at a timestep that `--method` chooses.

A frozen backbone and many heads at once (offline; the model and images ship with the package):

    accelerate launch -m aselect_hf.training.classify --model_name_or_path sample --dataset_name sample \\
        --validation_split validation --test_split test --freeze_backbone --method hfr \\
        --num_train_epochs 10 --output_dir runs/classify

The whole model, with the gate and both losses, on several GPUs:

    accelerate launch --config_file aselect_hf/training/configs/multi_gpu.yaml -m aselect_hf.training.classify \\
        --model_name_or_path you/dit-xl-2 --dataset_name ethz/food101 --validation_split validation \\
        --method gate --learning_rate 1e-4 --mixed_precision bf16 --output_dir runs/food101 --push_to_hub

Arguments may come from a YAML or JSON file, named first. A finished run saves its own in `training_args.json`.
"""

from __future__ import annotations

from aselect_hf.errors import one_line_errors
from aselect_hf.tasks import CLASSIFICATION
from aselect_hf.training.arguments import TaskDataArguments, TaskModelArguments, TrainingArguments
from aselect_hf.training.parsing import parse_arguments
from aselect_hf.training.task import TaskRun


def main() -> None:
    with one_line_errors("classify"):
        arguments = parse_arguments((TaskModelArguments, TaskDataArguments, TrainingArguments), __doc__)
        TaskRun(CLASSIFICATION, *arguments).run()


if __name__ == "__main__":
    main()
