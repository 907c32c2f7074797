"""The pairs of checkpoint, data and labels, and which of them may develop a rule.

Pairs that `develop` may be looked at while rules and their defaults are settled; those that `confirm` are measured
after that. Checkpoints beyond the shipped one are made by the commands below, with their seeds; they and the data lie
under `--root`, by these names.

    cifar10      python -m benchmarks.build_cifar10 package ROOT/cifar10
    cifar10-dit  accelerate launch -m aselect_hf.training.pretrain \\
        --dataset_name ROOT/cifar10 --output_dir ROOT/cifar10-dit \\
        --config_overrides hidden_size=128,num_hidden_layers=6,num_attention_heads=4,patch_size=4,\\
    sample_size=32,num_channels=3,num_condition_classes=0,learned_sigma=false \\
        --attn_implementation eager --mixed_precision bf16 --per_device_train_batch_size 128 --learning_rate 1e-3 \\
        --num_warmup_steps 200 --max_train_steps 5000 --ema_decay 0.999 --seed 0
    nuclei, nuclei-dit   see benchmarks/build_nuclei.py
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A checkpoint, a data set, and what is to be told.

    Args:
        model, data: folders under the root, or `"sample"`.
        task: `"classification"` or `"segmentation"`.
        role: `"develop"` or `"confirm"`.
        coarse: groups of classes that count as one, in place of the labels.
    """

    name: str
    model: str
    data: str
    task: str
    role: str
    coarse: tuple[tuple[int, ...], ...] | None = None


PAIRS = {
    pair.name: pair
    for pair in (
        Pair("fashion-mnist", "sample", "sample", "classification", "develop"),
        Pair(
            "fashion-mnist-coarse", "sample", "sample", "classification", "confirm",
            coarse=((0, 2, 3, 4, 6), (1,), (5, 7, 9), (8,)),  # worn above, trousers, shoes, bags
        ),
        Pair("fashion-mnist-segmentation", "sample", "sample", "segmentation", "develop"),
        Pair("nuclei", "nuclei-dit", "nuclei/tiles", "segmentation", "confirm"),
        Pair("cifar10", "cifar10-dit", "cifar10", "classification", "develop"),
        Pair(
            "cifar10-coarse", "cifar10-dit", "cifar10", "classification", "confirm",
            coarse=((0, 1, 8, 9), (2, 3, 4, 5, 6, 7)),  # vehicles, animals
        ),
    )
}  # fmt: skip
