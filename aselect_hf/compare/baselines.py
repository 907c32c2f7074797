"""Plain vision encoders under the same probe, as rows of a comparison: is a diffusion backbone worth it at all?

Not from the paper. Any vision model that `AutoModel` and `AutoImageProcessor` load can be a baseline.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig

from aselect_hf.compare.accuracies import ProbeAccuracies
from aselect_hf.cost import count_flops, weight_bytes
from aselect_hf.data.feature_cache import DEFAULT_CACHE, SHARD_IMAGES, FeatureShards
from aselect_hf.data.fingerprint import fingerprint
from aselect_hf.data.image_data import ImageData
from aselect_hf.files import as_path
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig

BATCH = 32
MOST_SPECIAL_TOKENS = 16
UNREAD = {"pooler", "head"}
"""Parts of a network that are not read, so that they may lack weights."""
ANY_IMAGE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")


@dataclass
class BaselineRow(ProbeAccuracies):
    """A plain encoder's accuracies and cost.

    Args:
        name: as it was given; of the diffusion backbone, which has a row among its baselines, the model's.
        revision: commit of the weights on the Hub; `None` for a folder.
        reads: what the probe sees.
        width: channels of that.
        parameters: number of parameters.
        weight_bytes: size of the weights.
        flops: floating-point operations per image, two per multiply-add.
        validation_accuracy, test_accuracies: as in `ComparisonRow`.
    """

    name: str
    revision: str | None
    reads: str
    width: int
    parameters: int
    weight_bytes: int
    flops: float
    validation_accuracy: float
    test_accuracies: list[float]


class Baseline:
    """An encoder with its own image processor, in float32 and evaluation mode.

    Of a network with tokens, the probe sees the class token and the mean of the patch tokens side by side, as DINOv2's
    linear probes do (Oquab et al. 2023, arXiv 2304.07193, appendix B.3); without a class token, the mean. Of a network
    with feature maps, it sees the mean of the last map. Both are `last_hidden_state`: a projection or a pooling head
    behind it, as CLIP and SigLIP have, is not read. A masked autoencoder sees whole images.

    Args:
        name: a folder or Hub id; `id@revision` for a branch, tag or commit.
        device: where it runs.

    Raises:
        ValueError: it is not a vision encoder that `AutoModel` and `AutoImageProcessor` load, weights are missing, it
            cannot run on a color image, or two runs on one image differ.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.source, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
        self.options: dict[str, Any] = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
        self.revision: str | None = None
        self.config = self._vision_config()
        self.processor = self._load(AutoImageProcessor, "an image processor", backend="pil")
        self.model = self._load_model().to(device).float().eval().requires_grad_(False)
        self.channels_last = False
        self.reads, self.width = self._try()

    def features(self, data: ImageData, progress: bool = True) -> np.ndarray:
        """What the probe sees of every image: `(images, width)` float32."""
        with tqdm(total=len(data), desc=self.name, unit="image", disable=not progress) as bar:
            return np.concatenate([*self._rows(data, range(len(data)), bar)])

    def cached_features(
        self, data: ImageData, *, cache_dir: str | Path | None = None, progress: bool = True
    ) -> np.ndarray:
        """`features`, from the cache if they are there; an interrupted run keeps its finished files.

        Args:
            cache_dir: as in `pooled_features`.

        Raises:
            ValueError: it is not writable.
        """
        shards = FeatureShards(
            folder=as_path(cache_dir or DEFAULT_CACHE) / self._cache_key(data),
            num_images=len(data),
            contents=("features",),
            shard_size=SHARD_IMAGES,
            dtype=torch.float32,
            first_rows=np.arange(len(data) + 1),
            width=self.width,
        )
        with shards.progress_bar(self.name, progress) as bar:

            def compute(shard: int, contents: list[str]) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
                started = time.perf_counter()
                rows = np.concatenate([*self._rows(data, shards.shard_images(shard), bar)])
                yield {"features": torch.from_numpy(rows)}, time.perf_counter() - started

            shards.fill(compute)
        return shards.values("features")

    def _cache_key(self, data: ImageData) -> str:
        choices = {"data": data.fingerprint, "reads": self.reads, "network": type(self.model).__name__}
        return fingerprint(self.model.state_dict(), choices | {"processor": self.processor.to_json_string()})

    def _rows(self, data: ImageData, images: range, bar: tqdm) -> Iterator[np.ndarray]:
        """Features of some images, in batches."""
        for start in range(images.start, images.stop, BATCH):
            batch = [self._picture(data.decode(index)) for index in images[start - images.start :][:BATCH]]
            with self._refusing():
                found = np.concatenate([self._forward(each)[0].cpu().numpy() for each in self._batches(batch)])
            if not np.isfinite(found).all():
                raise ValueError(f"baseline {self.name} gives NaN or infinite features: check its weights")
            yield found
            bar.update(len(batch))

    def row(self, example: Any, validation_accuracy: float, test_accuracies: list[float]) -> BaselineRow:
        """Its row of the table; operations are counted on a decoded `example` of the images."""
        (pixels,) = self._batches([self._picture(example)])
        return BaselineRow(
            name=self.name,
            revision=self.revision,
            reads=self.reads,
            width=self.width,
            parameters=sum(each.numel() for each in self.model.parameters()),
            weight_bytes=weight_bytes(self.model),
            flops=count_flops(lambda: self._forward(pixels)),
            validation_accuracy=validation_accuracy,
            test_accuracies=test_accuracies,
        )

    def _load(self, auto_class: Any, what: str, **options: Any) -> Any:
        try:
            return auto_class.from_pretrained(self.source, **self.options, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(f"baseline {self.name!r}: cannot load {what} ({reason})") from error

    def _vision_config(self) -> PreTrainedConfig:
        """The configuration of the encoder: of a model of images and text, that of its image tower."""
        config = self._load(AutoConfig, "a config")
        self.revision = getattr(config, "_commit_hash", None)
        if isinstance(config, NoisyBackboneConfig):
            raise ValueError(f"baseline {self.name!r} is a diffusion backbone: give it as the model to compare")
        if (tower := getattr(config, "vision_config", None)) is not None:
            config = tower
        if not (hasattr(config, "image_size") or hasattr(config, "num_channels") or "timm" in config.model_type):
            raise ValueError(f"baseline {self.name!r} is not a vision model: its type is {config.model_type!r}")
        if hasattr(config, "text_config"):
            raise ValueError(f"baseline {self.name!r} reads text as well as images ({config.model_type!r})")
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0
        return config

    def _load_model(self) -> torch.nn.Module:
        """The encoder with every weight from the checkpoint; only a pooling head, which is not read, may be new."""
        model, report = self._load(AutoModel, "a model", config=self.config, output_loading_info=True)
        missing = sorted(name for name in report["missing_keys"] if not UNREAD & {*name.split(".")})
        if missing or report["mismatched_keys"]:
            found = [*missing, *(str(each[0]) for each in report["mismatched_keys"])]
            raise ValueError(
                f"baseline {self.name!r} lacks {len(found)} weights of {type(model).__name__}, such as {found[0]}: "
                "its features would be random"
            )
        inputs = inspect.signature(model.forward).parameters
        if "pixel_values" not in inputs or "input_ids" in inputs:
            raise ValueError(f"baseline {self.name!r} is not an encoder of images alone: it reads {', '.join(inputs)}")
        return model

    def _picture(self, image: Image.Image | torch.Tensor) -> Image.Image:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        if image.shape[0] not in (1, 3):
            raise ValueError(f"a baseline needs gray or color images, got tensors of {image.shape[0]} channels")
        values = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(values.expand(3, *values.shape[1:]).permute(1, 2, 0).cpu().numpy())

    def _try(self) -> tuple[str, int]:
        """Run on an image, find out how its maps lie, and return what the probe sees and how many channels that has.

        Raises:
            ValueError: it cannot, or its features change from run to run.
        """
        with self._refusing():
            (pixels,) = self._batches([ANY_IMAGE])
            shape = self.model(pixel_values=pixels).last_hidden_state.shape
            self.channels_last = len(shape) == 4 and shape[1] == shape[2] != shape[3]
            (first, reads), (second, _) = self._forward(pixels), self._forward(pixels, seed=1)
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ValueError(f"baseline {self.name!r} is random: two runs on the same image give other features")
        return reads, first.shape[1]

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Name the baseline in whatever error its processor or network raises."""
        try:
            yield
        except (ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(f"baseline {self.name!r} cannot encode an image: {reason}") from error

    def _batches(self, images: list[Image.Image]) -> list[torch.Tensor]:
        """Preprocessed images `(images, 3, height, width)`; one batch if all have the same size, else one per image."""
        device = next(self.model.parameters()).device
        each = [self.processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
        same = len({pixels.shape for pixels in each}) == 1
        return [pixels.to(device).float() for pixels in ([torch.cat(each)] if same else each)]

    @torch.inference_mode()
    def _forward(self, pixels: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, str]:
        """Features of preprocessed images `(images, width)`, and what they are; random draws, if any, by `seed`."""
        with torch.random.fork_rng([pixels.device] if pixels.is_cuda else []):
            torch.manual_seed(seed)
            output = self.model(pixel_values=pixels).last_hidden_state
        if output.ndim == 4:
            return output.mean(dim=(1, 2) if self.channels_last else (2, 3)), "mean of the last feature map"
        if output.ndim != 3:
            raise ValueError(f"it gives neither tokens nor maps, but {tuple(output.shape)}")
        special = output.shape[1] - self._num_patches(pixels)
        if not 0 < special <= MOST_SPECIAL_TOKENS:
            return output.mean(dim=1), "mean of the tokens"
        pooled = torch.cat([output[:, 0], output[:, special:].mean(dim=1)], dim=1)
        return pooled, "class token and mean of the patch tokens"

    def _num_patches(self, pixels: torch.Tensor) -> int:
        """Patches of a plain vision transformer; 0 of another network."""
        side = getattr(self.config, "patch_size", None)
        rows, columns = (side, side) if isinstance(side, int) else side or (0, 0)
        return (pixels.shape[2] // rows) * (pixels.shape[3] // columns) if rows and columns else 0
