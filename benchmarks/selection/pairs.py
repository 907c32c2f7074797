"""The pairs of checkpoint, data and labels, and which of them may develop a rule.

Whatever the report chooses (a rule, the bounds of the audit) it chooses on pairs that `develop`, and judges on pairs
that `confirm`. The two share neither a checkpoint nor a data set: a checkpoint or data set has one role. The constants
inside the rules are older than this split; `left_out.fixed_by_hand` lists the pairs that had been looked at then.

Checkpoints are made by the commands below, with their seeds; they and the data lie under `--root`, by these names.
`fashion-mnist-dit`, a DiT for gray images, was the shipped sample until an RGB one replaced it:

    mkdir ROOT/fashion-mnist-dit
    git archive cd694fa aselect_hf/sample/model | tar x --strip-components 3 -C ROOT/fashion-mnist-dit

    cifar10         python -m benchmarks.build_cifar10 package ROOT/cifar10
    nuclei, nuclei-dit   see benchmarks/build_nuclei.py
    elpv            see benchmarks/build_elpv.py
    mnist           see benchmarks/build_mnist.py
    planted         python -m benchmarks.selection.planted ROOT/planted ROOT/planted-dit

The DiTs on CIFAR-10:

    accelerate launch -m aselect_hf.training.pretrain --dataset_name ROOT/cifar10 --output_dir ROOT/NAME \\
        --config_overrides SHAPE,num_attention_heads=4,num_channels=3,num_condition_classes=0,learned_sigma=false \\
        --attn_implementation eager --mixed_precision bf16 --per_device_train_batch_size 128 --learning_rate 1e-3 \\
        --num_warmup_steps 200 --max_train_steps STEPS --ema_decay 0.999 --random_flip True --seed 0

    NAME               STEPS  SHAPE
    cifar10-dit         5000  hidden_size=128,num_hidden_layers=6,patch_size=4,sample_size=32
    cifar10-dit-short   the same at step 1841 (`--checkpointing_steps 1841`), see benchmarks/selection/earlier.py
    cifar10-64-dit      1500  hidden_size=128,num_hidden_layers=6,patch_size=8,sample_size=64
    cifar10-flow-dit    1500  hidden_size=96,num_hidden_layers=4,patch_size=4,sample_size=32,
                              noise_schedule={"type":"flow_matching"}
    cifar10-class-dit   3100  hidden_size=192,num_hidden_layers=8,patch_size=4,sample_size=32 with
                              num_attention_heads=6,num_condition_classes=10: class-conditional, with a tenth of the
                              labels dropped; its features are those of the null class

Two more start from networks of their own, `python -m benchmarks.build_mmdit ROOT/cifar10-mmdit-init` (Stable Diffusion
3's class, with an empty prompt) and `python -m benchmarks.build_latent_dit ROOT/cifar10 ROOT/cifar10-latent-init`
(latents of a small VAE, v-prediction, class-conditional as above). `cifar10-mmdit` and `cifar10-latent-dit` come from
the command above with `--model_name_or_path ROOT/NAME-init` (without `-dit`) in place of `--config_overrides`, with
`--mixed_precision no`, for 1,500 steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aselect_hf.data.image_data import ImageData

TWIN_SEED = 1000
"""No sample of images is drawn with this seed; else most of the flipped labels could be in the sample."""
FASHION_GROUPS = ((0, 2, 3, 4, 6), (1,), (5, 7, 9), (8,))  # worn above, trousers, shoes, bags
CIFAR_GROUPS = ((0, 1, 8, 9), (2, 3, 4, 5, 6, 7))  # vehicles, animals


def coarse_labels(labels: np.ndarray, groups: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """The group of every label."""
    group_of = {label: group for group, members in enumerate(groups) for label in members}
    return np.array([group_of[label] for label in labels.tolist()])


@dataclass(frozen=True)
class Pair:
    """A checkpoint, a data set, and what is to be told.

    Args:
        model, data: folders under the root, or `"sample"`.
        task: `"classification"` or `"segmentation"`.
        role: `"develop"` or `"confirm"`.
        coarse: groups of classes that count as one, in place of the labels.
        fresh_noise: whether to measure the curve with noise of each image's own, too.
        flipped: share of the training images that get the label of another class, at random.
        imbalance: images of a class per image of the class before it, among the training images; 1 keeps all.
    """

    name: str
    model: str
    data: str
    task: str
    role: str
    coarse: tuple[tuple[int, ...], ...] | None = None
    fresh_noise: bool = False
    flipped: float = 0.0
    imbalance: float = 1.0

    @property
    def is_twin(self) -> bool:
        """Whether its training images are those of another pair, with labels or numbers changed."""
        return bool(self.flipped) or self.imbalance != 1

    def training_images(self, images: ImageData) -> ImageData:
        """The training images with the labels, and in the numbers, that this pair gives them."""
        if not self.is_twin:
            return images
        generator, labels = np.random.default_rng(TWIN_SEED), np.array(images.labels)
        classes, counts = np.unique(labels, return_counts=True)
        if self.flipped:
            rows = generator.permutation(len(labels))[: round(self.flipped * len(labels))]
            places = np.searchsorted(classes, labels[rows]) + generator.integers(1, len(classes), len(rows))
            labels[rows] = classes[places % len(classes)]
            return ImageData(images.items, labels, images.label_names, name=images.name)
        kept = [
            generator.permutation(np.flatnonzero(labels == each))[: max(2, round(count * self.imbalance**place))]
            for place, (each, count) in enumerate(zip(classes, counts, strict=True))
        ]
        return images.subset(np.sort(np.concatenate(kept)))


PAIRS = {
    pair.name: pair
    for pair in (
        Pair("fashion-mnist", "fashion-mnist-dit", "sample", "classification", "develop", fresh_noise=True),
        Pair("fashion-mnist-segmentation", "fashion-mnist-dit", "sample", "segmentation", "develop"),
        Pair("fashion-mnist-coarse", "fashion-mnist-dit", "sample", "classification", "develop", FASHION_GROUPS),
        Pair("fashion-mnist-noised", "fashion-mnist-dit", "sample", "classification", "develop", flipped=0.2),
        Pair("fashion-mnist-shifted", "fashion-mnist-dit", "sample", "classification", "develop", imbalance=0.65),
        Pair("mnist", "fashion-mnist-dit", "mnist", "classification", "develop", fresh_noise=True),
        Pair("planted", "planted-dit", "planted", "classification", "develop", fresh_noise=True),
        Pair("cifar10", "cifar10-dit", "cifar10", "classification", "confirm"),
        Pair("cifar10-short", "cifar10-dit-short", "cifar10", "classification", "confirm"),
        Pair("cifar10-coarse", "cifar10-dit", "cifar10", "classification", "confirm", CIFAR_GROUPS),
        Pair("cifar10-64", "cifar10-64-dit", "cifar10", "classification", "confirm", fresh_noise=True),
        Pair("cifar10-flow", "cifar10-flow-dit", "cifar10", "classification", "confirm"),
        Pair("cifar10-class", "cifar10-class-dit", "cifar10", "classification", "confirm", fresh_noise=True),
        Pair("cifar10-mmdit", "cifar10-mmdit", "cifar10", "classification", "confirm", fresh_noise=True),
        Pair("cifar10-latent", "cifar10-latent-dit", "cifar10", "classification", "confirm", fresh_noise=True),
        Pair("elpv", "cifar10-dit", "elpv", "classification", "confirm"),
        Pair("nuclei", "nuclei-dit", "nuclei/tiles", "segmentation", "confirm"),
    )
}
