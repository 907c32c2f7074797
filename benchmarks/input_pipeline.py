"""Is reading images the bottleneck, and what does the latent cache save?

    python -m benchmarks.input_pipeline

Protocol. Loading: images per second of decoding and preprocessing alone, by number of worker processes, compared with
images per second of the model that reads them. The models are the sample model on the sample (28 pixels, PNG), and a
small `AutoencoderKL` with a 6-block DiT on 256 x 256 pixels, from RGB JPEG files of smoothed noise. Latent cache: in a
frozen backbone's first epoch over those files, `cached_latents` encodes every image; in later epochs it reads them all.
Both times exclude the DiT and the head. Times are wall-clock seconds, the best of `--repeats`. The command writes
`benchmarks/results/input-pipeline.json`.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from aselect_hf import ASelectDiTConfig, ASelectDiTModel
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents
from aselect_hf.data.sources import load_images
from aselect_hf.files import write_json
from aselect_hf.versions import hardware, installed_versions

RESULTS = Path(__file__).parent / "results"
SMALL_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 256,
}
BATCH = 32


def photos(folder: Path, count: int) -> ImageData:
    """Write JPEG files of 320 x 280 pixels: noise smoothed at two scales, about as large as photographs."""
    rng = np.random.default_rng(0)
    for index in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (280, 320, 3), dtype=np.uint8))
        blend = Image.blend(noise.filter(ImageFilter.GaussianBlur(12)), noise.filter(ImageFilter.GaussianBlur(1)), 0.5)
        buffer = io.BytesIO()
        blend.save(buffer, "JPEG", quality=90)
        (folder / f"{index:05d}.jpg").write_bytes(buffer.getvalue())
    return ImageData(sorted(folder.iterdir()), name="photos")


def best_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def rates(model: ASelectDiTModel, data: ImageData, workers: list[int], repeats: int) -> dict[str, Any]:
    """Images per second of loading, by number of workers, and of the model on loaded images."""
    loading = {
        str(number): len(data)
        / best_seconds(lambda n=number: list(data.batches(model.config, BATCH, num_workers=n)), repeats)
        for number in workers
    }
    pixels = next(data.batches(model.config, BATCH)).to(model.device)
    with torch.inference_mode():
        model_rate = len(pixels) / best_seconds(lambda: model(pixels), repeats + 1)
    return {
        "images": len(data),
        "loading_images_per_second_by_workers": loading,
        "model_images_per_second": model_rate,
        "loading_is_the_bottleneck": max(loading.values()) < model_rate,
    }


def latent_cache(model: ASelectDiTModel, data: ImageData, repeats: int) -> dict[str, float]:
    """Seconds of the first epoch (encoding) and of a later epoch (reading), and their ratio."""
    order = np.random.default_rng(0).permutation(len(data))

    def epoch(folder: str) -> None:
        cache = cached_latents(model, data, batch_size=BATCH, cache_dir=folder, progress=False)
        for start in range(0, len(data), BATCH):
            cache.gather(order[start : start + BATCH]).to(model.device)

    with tempfile.TemporaryDirectory() as folder:
        first = best_seconds(lambda: epoch(folder), 1)
        later = best_seconds(lambda: epoch(folder), repeats)
    return {"first_epoch_seconds": first, "later_epoch_seconds": later, "ratio": first / later}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="number of JPEG files to make")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of worker processes to try")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    sample = load_model("sample").to(arguments.device).eval()
    config = ASelectDiTConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, patch_size=2, sample_size=32, num_channels=4,
        num_condition_classes=0, timestep=100, feature="blocks.-1.hidden", vae_config=SMALL_VAE,
    )  # fmt: skip
    latent = ASelectDiTModel(config).to(arguments.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        files = photos(Path(folder), arguments.images)
        images = ImageData.of(load_images("sample", "train")).sample(1000, 0)
        content = {
            "sample": rates(sample, images, arguments.workers, arguments.repeats),
            "jpeg_256": rates(latent, files, arguments.workers, arguments.repeats),
            "latent_cache": latent_cache(latent, files, arguments.repeats),
            "protocol": {
                "jpeg files": f"{arguments.images} of 320 x 280 pixels",
                "batch": BATCH,
                "vae channels": SMALL_VAE["block_out_channels"],
                "threads": torch.get_num_threads(),
                "hardware": hardware(sample.device),
                "versions": installed_versions(),
            },
        }
    write_json(RESULTS / "input-pipeline.json", content)
    print(
        "| images | loading, by workers (images/s) | model (images/s) | loading is the bottleneck |\n|---|---|---|---|"
    )
    for name in ("sample", "jpeg_256"):
        each = content[name]
        loading = ", ".join(f"{n}: {rate:,.0f}" for n, rate in each["loading_images_per_second_by_workers"].items())
        verdict = "yes" if each["loading_is_the_bottleneck"] else "no"
        print(f"| {name} | {loading} | {each['model_images_per_second']:,.1f} | {verdict} |")
    cache = content["latent_cache"]
    print(
        f"\nLatent cache: first epoch {cache['first_epoch_seconds']:.2f} s, later ones "
        f"{cache['later_epoch_seconds']:.3f} s, ratio {cache['ratio']:.0f}\n\nProtocol: {content['protocol']}"
    )


if __name__ == "__main__":
    main()
