"""A model as one file for other runtimes: ONNX, or a program of `torch.export`.

The file is checked against the model before it is written. It holds one timestep and the stored noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from aselect_hf.conversion.convert import load_checkpoint
from aselect_hf.files import atomic_directory, check_absent, write_json
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor
from aselect_hf.tasks import task_of_model
from aselect_hf.versions import installed_versions

Format = Literal["onnx", "torch-export"]
FILES: dict[str, str] = {"onnx": "model.onnx", "torch-export": "model.pt2"}
QUANTIZED = "model-int8.onnx"
MAX_BATCH = 64
TOLERANCE = 1e-3
"""Largest accepted difference between the file's outputs and the model's, relative to the largest of these."""
EXAMPLE_BATCH, CHECKED_BATCHES = 2, (1, 2, 5)


@dataclass(frozen=True)
class Export:
    """What was written, also as `export.json` beside it.

    Args:
        file: name of the file.
        inputs: name, shape and type of the input; the first dimension is the batch, `1..MAX_BATCH`.
        outputs: their names.
        difference: largest difference to the model's outputs over `CHECKED_BATCHES`, relative to the largest output.
        quantized_difference: that of the int8 file, if there is one.
        timestep, feature: what the file computes; a head may read several.
        labels: names of the classes, for a classifier or a segmenter.
    """

    file: str
    inputs: dict[str, Any]
    outputs: list[str]
    difference: float
    quantized_difference: float | None
    timestep: int | None
    feature: str | None
    labels: dict[int, str] | None
    versions: dict[str, str]


class Exported(nn.Module):
    """What a file computes: tensors in, tensors out.

    Args:
        uint8: take pixels of 0..255 and normalize them inside.
    """

    def __init__(self, model: Any, uint8: bool) -> None:
        super().__init__()
        self.model, self.uint8 = model, uint8
        self.names = ["logits"] if task_of_model(model).needs else ["last_hidden_state", "pooler_output"]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.uint8:
            pixel_values = pixel_values.float() / 127.5 - 1
        output = self.model(pixel_values=pixel_values)
        return tuple(output[name] for name in self.names)

    def example(self, batch: int) -> torch.Tensor:
        """Random pixels of a batch."""
        config, generator = self.model.config, torch.Generator().manual_seed(batch)
        channels = config.vae_config["in_channels"] if config.vae_config else config.num_channels
        shape = (batch, channels, config.image_size, config.image_size)
        levels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return levels if self.uint8 else levels.float() / 127.5 - 1


def export_model(
    source: str | Path,
    output_dir: str | Path,
    *,
    format: Format = "onnx",
    uint8: bool = False,
    quantize: bool = False,
    **keywords: Any,
) -> Export:
    """Write a model as one file, with its image processor and `export.json`.

    Args:
        source: what `convert_checkpoint` reads; the head comes along.
        output_dir: folder to write; it must not exist, or be empty.
        format: `"onnx"` or `"torch-export"`.
        uint8: the file takes pixels of 0..255 and normalizes them itself; resizing stays outside.
        quantize: for ONNX, also write `model-int8.onnx`, whose linear layers have 8-bit weights (dynamic quantization).
        keywords: as in `convert_checkpoint`, such as `timestep`, `feature` or `revision`.

    Raises:
        ImportError: onnx or onnxruntime is missing.
        ValueError: `output_dir` is not empty, `quantize` is asked for another format, or the file's outputs differ from
            the model's; nothing is written then.
    """
    if format not in FILES:
        raise ValueError(f"format must be one of {', '.join(FILES)}; got {format!r}")
    if quantize and format != "onnx":
        raise ValueError(f"quantize is of format='onnx', got format={format!r}")
    if format == "onnx":
        _require_onnx()
    check_absent(output_dir)
    model = load_checkpoint(source, keep_head=True, dtype="float32", **keywords).eval()
    model.set_attn_implementation("sdpa")
    exported = Exported(model, uint8)
    with atomic_directory(output_dir) as folder:
        path = folder / FILES[format]
        run = _write_onnx(exported, path) if format == "onnx" else _write_program(exported, path)
        difference = _difference(exported, run, FILES[format])
        quantized = None
        if quantize:
            quantized = _difference(exported, _quantize(path, folder / QUANTIZED), QUANTIZED, tolerance=None)
        make_image_processor(model.config, task_of_model(model).whole_image).save_pretrained(folder)
        report = _report(exported, FILES[format], difference, quantized)
        write_json(folder / "export.json", asdict(report))
    return report


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        needed = "an ONNX file needs onnx, onnxscript and onnxruntime: pip install 'aselect-hf[export]'"
        raise ImportError(f"{needed} ({error})") from error


def _program(exported: Exported) -> Any:
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}}
    with torch.no_grad():
        return torch.export.export(exported, (exported.example(EXAMPLE_BATCH),), dynamic_shapes=shapes)


def _write_program(exported: Exported, path: Path) -> Callable[[torch.Tensor], Any]:
    torch.export.save(_program(copy.deepcopy(exported)), path)
    return torch.export.load(path).module()


def _write_onnx(exported: Exported, path: Path) -> Callable[[torch.Tensor], Any]:
    names: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": exported.names}
    torch.onnx.export(_program(copy.deepcopy(exported)), f=path, external_data=False, verbose=False, **names)
    return _session(path)


def _session(path: Path) -> Callable[[torch.Tensor], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: [torch.from_numpy(each) for each in session.run(None, {"pixel_values": pixels.numpy()})]


def _quantize(path: Path, quantized: Path) -> Callable[[torch.Tensor], Any]:
    """Quantize the linear layers dynamically.

    `reduce_range` leaves a bit unused. Processors without VNNI instructions add pairs of 8-bit products in 16 bits,
    which saturates with all 8 bits, so the same file would give other numbers there.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    del model.graph.value_info[:]  # shapes that the exporter wrote before its optimizer moved transposes
    options = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True, "reduce_range": True}
    quantize_dynamic(model, quantized, weight_type=QuantType.QInt8, **options)
    return _session(quantized)


def _difference(
    exported: Exported, run: Callable[[torch.Tensor], Any], file: str, tolerance: float | None = TOLERANCE
) -> float:
    """Largest relative difference over several batch sizes."""
    worst = 0.0
    for batch in CHECKED_BATCHES:
        pixels = exported.example(batch)
        with torch.no_grad():
            expected = exported(pixels)
        for ours, theirs in zip(expected, run(pixels), strict=True):
            worst = max(worst, ((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12)).item())
    if tolerance is not None and not worst <= tolerance:
        raise ValueError(f"{file} gives other outputs than the model: relative difference {worst:.2g}")
    return worst


def _report(exported: Exported, file: str, difference: float, quantized: float | None) -> Export:
    config, example = exported.model.config, exported.example(1)
    return Export(
        file=file,
        inputs={"pixel_values": {"shape": ["batch", *example.shape[1:]], "dtype": str(example.dtype)[6:]}},
        outputs=exported.names,
        difference=difference,
        quantized_difference=quantized,
        timestep=config.timestep,
        feature=config.feature,
        labels=dict(config.id2label) if exported.names == ["logits"] else None,
        versions=installed_versions(),
    )
