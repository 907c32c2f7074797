"""The page `docs/failure-modes.md` and its pictures: what goes wrong with a pick, and what the audit says of it.

    python -m benchmarks.selection.failure_modes

Everything is made from the shipped model and images, the failures by changing them here. Deterministic, on one core a
few minutes. Every figure on the page is taken from the audits that are drawn beside it.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import set_seed

from aselect_hf import ASelectDiTModel, TimestepSelection, select_timestep
from aselect_hf.audit import Audit, audit_timestep
from aselect_hf.conversion import load_model
from aselect_hf.data import ImageData

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "failure-modes"
NUM_IMAGES, NUM_TIMESTEPS = 120, 8
COLORS = 48  # of the pictures' palette: a quarter of their size
FEATURE_BLOCK = 4  # of the shipped model's feature
MASSIVE_BLOCK, MASSIVE_CHANNEL, MASSIVE_FACTOR = 1, 7, 300.0
POSITION_FACTOR = 10.0
CURVES = ("hfr", "rankme", "logme")


@dataclass
class Measured:
    """What a section of the page rests on.

    Args:
        audits: by what was audited; the first one is drawn and quoted.
        curves: selections to draw against each other, by rule: of the shipped model, and of the changed one.
    """

    audits: dict[str, Audit]
    curves: dict[str, tuple[TimestepSelection, TimestepSelection]] = field(default_factory=dict)


@dataclass
class Mode:
    """A section of the page.

    Args:
        title: its heading.
        measure: what makes the failure, and audits it.
        tell: what one sees, whether the audit notices, and what to do.
    """

    title: str
    measure: Callable[[Sample], Measured]
    tell: Callable[[Measured], tuple[str, str, str]]


class Sample:
    """The shipped model and images, and the audit at the page's settings."""

    def __init__(self) -> None:
        self.model: ASelectDiTModel = load_model("sample").eval()
        self.images = ImageData.of("sample")
        self.unlabelled = ImageData(self.images.items, name="sample without labels")

    def audit(self, model: ASelectDiTModel | None = None, images: ImageData | None = None, **options: Any) -> Audit:
        if "selection" not in options:
            options = {"timesteps": NUM_TIMESTEPS} | options
        options = {"num_images": NUM_IMAGES, "progress": False} | options
        return audit_timestep(model or self.model, self.images if images is None else images, **options)

    def changed(self, change: Callable[[ASelectDiTModel], None]) -> ASelectDiTModel:
        """A copy of the model, after `change`."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            change(model)
        return model


def gratings(num: int, seed: int) -> ImageData:
    """Sine gratings of 4 orientations, the classes; wavelength, phase and contrast are random, with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:28, :28]
    labels, images = np.arange(num) % 4, []
    for label in labels:
        angle = np.pi * label / 4
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / rng.uniform(3, 9) + rng.uniform(0, 7))
        values = 0.5 + rng.uniform(0.1, 0.4) * wave + 0.08 * rng.standard_normal(x.shape)
        images.append(Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8)))
    return ImageData(images, labels, name="gratings")


def scale_channel(block: int) -> Callable[[ASelectDiTModel], None]:
    """Make one channel of what a block's MLP writes massive."""

    def change(model: ASelectDiTModel) -> None:
        for parameter in (model.layers[block].mlp.fc2.weight, model.layers[block].mlp.fc2.bias):
            parameter[MASSIVE_CHANNEL] *= MASSIVE_FACTOR

    return change


def scale_positions(model: ASelectDiTModel) -> None:
    model.position_embedding *= POSITION_FACTOR


def measure_flat(sample: Sample) -> Measured:
    return Measured({"flat": sample.audit(method="hfr", pool_size=3)})


def measure_massive(sample: Sample) -> Measured:
    inside, earlier = (sample.changed(scale_channel(block)) for block in (FEATURE_BLOCK, MASSIVE_BLOCK))
    audits = {
        "earlier": sample.audit(earlier, method="hfr"),
        "shipped": sample.audit(method="hfr"),
        "inside": sample.audit(inside, method="hfr"),
    }
    curves = {"hfr": (audits["shipped"].selections["hfr"], audits["earlier"].selections["hfr"])}
    for method in ("rankme", "logme"):
        before, after = (
            select_timestep(
                model, sample.images, method=method, timesteps=NUM_TIMESTEPS, num_images=NUM_IMAGES, progress=False
            )
            for model in (sample.model, earlier)
        )
        curves[method] = before, after
    return Measured(audits, curves)


def measure_few(sample: Sample) -> Measured:
    four = {"images": sample.unlabelled, "num_images": 4}
    return Measured({"retrieval": sample.audit(method="retrieval", **four), "hfr": sample.audit(**four)})


def measure_foreign(sample: Sample) -> Measured:
    """The pick of the shipped images on gratings; and a pick on the gratings themselves."""
    run = {"timesteps": NUM_TIMESTEPS, "num_images": NUM_IMAGES, "progress": False}
    picked = select_timestep(sample.model, sample.images, **run)
    images = gratings(NUM_IMAGES, seed=0)
    return Measured(
        {
            "moved": sample.audit(images=images, selection=picked),
            "hfr": sample.audit(images=images, method="hfr"),
            "unlabelled": sample.audit(images=ImageData(images.items)),
        }
    )


def measure_position(sample: Sample) -> Measured:
    model = sample.changed(scale_positions)
    return Measured({"hfr": sample.audit(model, method="hfr"), "unlabelled": sample.audit(model, sample.unlabelled)})


def measure_untrained(sample: Sample) -> Measured:
    set_seed(0)
    model = ASelectDiTModel(sample.model.config).eval()
    return Measured({"hfr": sample.audit(model, method="hfr"), "unlabelled": sample.audit(model, sample.unlabelled)})


def picture(figure_or_audit: Figure | Audit, path: Path) -> None:
    """Write a picture of few colours, half the size of the audit's own."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "drawn.png"
        if isinstance(figure_or_audit, Audit):
            figure_or_audit.plot(drawn)
        else:
            figure_or_audit.savefig(drawn, dpi=130)
        image = Image.open(drawn).convert("RGB")
        width = min(image.width, WIDTH)
        small = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        small.quantize(COLORS).save(path, optimize=True)


def draw_curves(curves: dict[str, tuple[TimestepSelection, TimestepSelection]]) -> Figure:
    """Each rule's curve of the shipped model and of the changed one, on scales of their own, and their picks."""
    figure = Figure(figsize=(8.0, 2.9), layout="constrained")
    for axis, (rule, pair) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for selection, color, label in zip(pair, ("#8b949e", "#cf222e"), ("shipped", "massive"), strict=True):
            label = f"{label}: t = {selection.timestep}"
            axis.plot(selection.timesteps, selection.scores, "o-", ms=3, color=color, label=label)
            axis.axvline(selection.timestep, color=color, lw=0.8, ls="--")
        axis.set_title(rule)
        axis.set_xlabel("timestep t")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
    return figure


def page(measured: dict[str, Measured]) -> str:
    """The whole of `docs/failure-modes.md`."""
    sections = [INTRODUCTION]
    for name, each in measured.items():
        mode = MODES[name]
        seen, noticed, do = mode.tell(each)
        drawn, *_ = each.audits.values()
        said = "\n".join(f"> {line}  " for line in drawn.describe().splitlines())
        sections.append(f"## {mode.title}\n\n![{mode.title}](failure-modes/{name}.png)\n\n{seen}\n\n{said}\n")
        if each.curves:
            sections[-1] += f"\n![Curves of three rules](failure-modes/{name}-curves.png)\n"
        sections[-1] += f"\n**Noticed?** {noticed}\n\n**What to do.** {do}\n"
    return "\n".join(sections)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sample = Sample()
    measured = {name: mode.measure(sample) for name, mode in MODES.items()}
    write(measured)


def write(measured: dict[str, Measured]) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, each in measured.items():
        picture(next(iter(each.audits.values())), PICTURES / f"{name}.png")
        if each.curves:
            picture(draw_curves(each.curves), PICTURES / f"{name}-curves.png")
    (DOCS / "failure-modes.md").write_text(page(measured))


if __name__ == "__main__":
    main()
