"""The page `docs/failure-modes.md` and its pictures: how a pick goes wrong, and what the audit says about it.

    python -m benchmarks.selection.failure_modes --model data/fashion-mnist-dit

The failures are made here by changing the DiT of the pair `fashion-mnist` and the shipped images. The run is
deterministic and takes a few minutes on one core. Every number on the page comes from the audits that are drawn beside
it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import textwrap
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
from aselect_hf.audit.verdicts import FEW_LABELED
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.files import write_text
from aselect_hf.selection import RULES
from aselect_hf.selection.rules.consensus import LEAST_FOR_CLUSTERS
from benchmarks.selection.pairs import FASHION_GROUPS, coarse_labels

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "failure-modes"
NUM_IMAGES, NUM_TIMESTEPS = 120, 8
NUM_FLAT = 500  # only narrow bounds show that a curve is flat
COLORS, WIDTH = 128, 720  # of the pictures
FEATURE_BLOCK = 4  # block of the model's feature
MASSIVE_BLOCK, MASSIVE_CHANNEL, MASSIVE_FACTOR = 1, 7, 300.0
POSITION_FACTOR = 10.0
CURVES = ("hfr", "rankme", "logme")


@dataclass
class Measured:
    """Measurements behind a section of the page.

    Args:
        audits: audits by name; the first one is drawn and quoted.
        curves: selections to compare in a picture, by rule: one of the unchanged model and one of the changed model.
    """

    audits: dict[str, Audit]
    curves: dict[str, tuple[TimestepSelection, TimestepSelection]] = field(default_factory=dict)


@dataclass
class Mode:
    """A section of the page.

    Args:
        title: heading.
        measure: makes the failure and audits it.
        tell: tells what the picture shows, whether the audit notices, and what to do.
    """

    title: str
    measure: Callable[[Sample], Measured]
    tell: Callable[[Measured], tuple[str, str, str]]


class Sample:
    """The model and the shipped images, and an audit with the page's settings."""

    def __init__(self, model: Path) -> None:
        self.model: ASelectDiTModel = load_model(model).eval()
        self.images = ImageData.of("sample")
        self.unlabeled = ImageData(self.images.items, name="sample without labels")

    def audit(self, model: ASelectDiTModel | None = None, images: ImageData | None = None, **options: Any) -> Audit:
        if "selection" not in options:
            options = {"method": "hfr", "timesteps": NUM_TIMESTEPS} | options
        options = {"num_images": NUM_IMAGES, "progress": False} | options
        return audit_timestep(model or self.model, self.images if images is None else images, **options)

    def changed(self, change: Callable[[ASelectDiTModel], None]) -> ASelectDiTModel:
        """A copy of the model, after `change`."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            change(model)
        return model


def gratings(num: int, seed: int) -> ImageData:
    """Sine gratings; the classes are 4 orientations; wavelength, phase and contrast are random, with a little noise."""
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
    """Make one channel of the output of a block's MLP massive."""

    def change(model: ASelectDiTModel) -> None:
        for parameter in (model.layers[block].mlp.fc2.weight, model.layers[block].mlp.fc2.bias):
            parameter[MASSIVE_CHANNEL] *= MASSIVE_FACTOR

    return change


def scale_positions(model: ASelectDiTModel) -> None:
    model.position_embedding *= POSITION_FACTOR


def measure_flat(sample: Sample) -> Measured:
    labels = coarse_labels(np.asarray(sample.images.labels), FASHION_GROUPS)
    coarse = ImageData(sample.images.items, labels, name="coarse sample")
    options = {"pool_size": 3, "num_images": NUM_FLAT}
    return Measured(
        {
            "flat": sample.audit(images=coarse, method="hfr", **options),
            "unlabeled": sample.audit(images=sample.unlabeled, pool_size=3),
        }
    )


def measure_massive(sample: Sample) -> Measured:
    inside, earlier = (sample.changed(scale_channel(block)) for block in (FEATURE_BLOCK, MASSIVE_BLOCK))
    audits = {
        "earlier": sample.audit(earlier, method="hfr"),
        "unchanged": sample.audit(method="hfr"),
        "inside": sample.audit(inside, method="hfr"),
        "unlabeled": sample.audit(earlier, sample.unlabeled),
    }
    curves = {"hfr": (audits["unchanged"].selections["hfr"], audits["earlier"].selections["hfr"])}
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
    four = {"images": sample.unlabeled, "num_images": 4}
    return Measured({"retrieval": sample.audit(method="retrieval", **four), "hfr": sample.audit(**four)})


def measure_foreign(sample: Sample) -> Measured:
    """Audit, on gratings, the pick from the shipped images and a pick from the gratings themselves."""
    run = {"timesteps": NUM_TIMESTEPS, "num_images": NUM_IMAGES, "progress": False}
    picked = select_timestep(sample.model, sample.images, **run)
    images = gratings(NUM_IMAGES, seed=0)
    return Measured(
        {
            "moved": sample.audit(images=images, selection=picked),
            "hfr": sample.audit(images=images, method="hfr"),
            "unlabeled": sample.audit(images=ImageData(images.items), selection=picked),
        }
    )


def measure_position(sample: Sample) -> Measured:
    model = sample.changed(scale_positions)
    return Measured({"hfr": sample.audit(model, method="hfr"), "unlabeled": sample.audit(model, sample.unlabeled)})


def measure_untrained(sample: Sample) -> Measured:
    set_seed(1)  # the audit's own untrained network has 0
    model = ASelectDiTModel(sample.model.config).eval()
    return Measured({"hfr": sample.audit(model, method="hfr"), "unlabeled": sample.audit(model, sample.unlabeled)})


def measure_agreement(sample: Sample) -> Measured:
    return Measured(
        {
            "labeled": sample.audit(method="hfr"),
            "unlabeled": sample.audit(images=sample.unlabeled),
            "retrieval": sample.audit(images=sample.unlabeled, method="retrieval"),
        }
    )


def tell_flat(found: Measured) -> tuple[str, str, str]:
    audit = found.audits["flat"]
    scores = audit.checked.scores
    return (
        "The gray DiT with an easy task: garments, trousers, shoes or bags, from features averaged over 3 x 3 "
        f"cells. Between t = {audit.checked.timesteps[0]} and {audit.checked.timesteps[-1]} the accuracy of the probe "
        f"varies by {100 * (max(scores) - min(scores)):.1f} points on {audit.checked.num_images} images. HFR falls "
        "steeply nevertheless: a clear HFR curve does not mean that the timestep matters.",
        f"Yes, with labels. Without labels: {quoted(found.audits['unlabeled'])}. A rule without labels knows neither "
        "the task nor that the timestep makes no difference to it: for masks of the same images the curve is steep, "
        "and such a rule sees the same features ([evidence](evidence.md#nothing-to-choose-without-labels)).",
        "Take the cheapest timestep, or the one that your other experiments use, and spend the time elsewhere. To "
        "find out whether a small difference is real, label more images: the bounds shrink with the square root of "
        "their number.",
    )


def tell_massive(found: Measured) -> tuple[str, str, str]:
    unchanged, inside = found.audits["unchanged"], found.audits["inside"]
    moved = "; ".join(
        f"{rule} from t = {before.timestep} to {after.timestep}" for rule, (before, after) in found.curves.items()
    )
    worst = max(
        abs(a - b) for a, b in zip(unchanged.selections["hfr"].scores, inside.selections["hfr"].scores, strict=True)
    )
    named = any(each.startswith("massive activations before") for each in found.audits["earlier"].warnings)
    return (
        f"Produced artificially: in a copy of the gray DiT, channel {MASSIVE_CHANNEL} of the MLP's output in "
        f"block {MASSIVE_BLOCK} is multiplied by {MASSIVE_FACTOR:g} (weights and bias). Large pretrained DiTs develop "
        "such channels by themselves (DiTF). They dominate the scale of every later LayerNorm, so that all other "
        f"channels shrink and the curves become those of a different network. The picks move: {moved}. If the same "
        f"channel is massive in the feature itself (block {FEATURE_BLOCK}), nothing changes: HFR weights all channels "
        f"equally, and the other rules standardize them. The two HFR curves differ by at most {worst:.1e}.",
        f"{'Yes' if named else 'Not'}, with labels, by the points that the pick loses. "
        f"{'The last warning names the cause' if named else 'The cause is not named'}: where a verdict is bad, the "
        "audit looks for massive channels in the blocks before the feature. Without labels: "
        f"{quoted(found.audits['unlabeled'])}, with the same warning.",
        "Audit a feature of an earlier block, or of another kind.",
    )


def tell_few(found: Measured) -> tuple[str, str, str]:
    hfr = found.audits["hfr"]
    return (
        "Four images without labels; instance retrieval picks. With four images its score can take only a few values. "
        "The lowest panel shows that its picks from resamples of these images spread. HFR averages over many tokens "
        f"and channels and picks t = {hfr.timestep} in {share(hfr):.0%} of its resamples: **a stable pick is not "
        "necessarily right**. Stability only means that it does not depend on which of the images are drawn.",
        f"Yes. For the same four images with HFR as the rule, the verdict is {hfr.verdict!r}.",
        f"Give {LEAST_FOR_CLUSTERS} images or more (default: {RULES['consensus'].num_images} for retrieval and "
        f"consensus, {RULES['hfr'].num_images} for HFR); they need no labels. With labels, give {FEW_LABELED} or more.",
    )


def tell_foreign(found: Measured) -> tuple[str, str, str]:
    moved, again, blind = (found.audits[name] for name in ("moved", "hfr", "unlabeled"))
    return (
        f"On Fashion-MNIST, a few labels choose t = {moved.timestep}. This timestep is then used for sine gratings of "
        "four orientations, which are made in code. The lowest panel shows the rule's curve on *its* images, which "
        f"peaks there. On the gratings the probe is best at t = {moved.checked.timestep}, with "
        f"{points(max(moved.checked.scores))} % against "
        f"{points(moved.checked.scores[moved.checked.timesteps.index(moved.timestep)])} %.",
        f"Yes, with labels. Without labels: {quoted(blind)}. The audit does not notice that the images are foreign, "
        "because it knows only the images that it is given.",
        f"Choose again on your own images (here HFR picks t = {again.timestep}: {again.verdict}). If a checkpoint "
        "comes with a timestep, audit it before you use it: `aselect audit MODEL DATA --selection selection.json`.",
    )


def tell_position(found: Measured) -> tuple[str, str, str]:
    hfr = found.audits["hfr"].selections["hfr"]
    return (
        f"Produced artificially: the position embedding of the gray DiT is multiplied by {POSITION_FACTOR:g}. The "
        "feature then shows where a token is, whatever the image shows. The curves of images and of pure noise "
        f"coincide, and the HFR that remains after subtraction is at most {max(hfr.scores):.4f}.",
        "Yes, by the share of the HFR that pure noise has, and by an untrained network that does about as well. "
        f"Without labels: {quoted(found.audits['unlabeled'])}.",
        "Use another kind of feature, or a later block, where the two curves differ, and label some images.",
    )


def tell_untrained(found: Measured) -> tuple[str, str, str]:
    hfr, blind = found.audits["hfr"], found.audits["unlabeled"]
    return (
        "The same architecture with random weights. The probe is well above chance "
        f"({points(max(hfr.checked.scores))} % against {points(hfr.chance or 0)} %), because random features preserve "
        "the pixels.",
        "Yes, with labels, by the last warning: the same probe does as well on another network with random weights "
        f"({points(hfr.untrained or 0)} %). The verdict still concerns only the timestep. Without labels, the audit "
        f"says nothing about the model: {quoted(blind)}.",
        "Check that the checkpoint was trained on such images and that all of its weights were loaded. Compare with "
        "raw pixels too, as `aselect compare` always does.",
    )


def tell_agreement(found: Measured) -> tuple[str, str, str]:
    labeled, blind, retrieval = (found.audits[name] for name in ("labeled", "unlabeled", "retrieval"))
    regret = labeled.regret
    assert regret is not None
    return (
        "Nothing is changed here: the gray DiT on its own images, all ten classes, token means. HFR and instance "
        f"retrieval (t = {retrieval.timestep}) both prefer the cleanest inputs, where single images are easiest to "
        f"tell apart. Classes are easiest to tell apart at t = {regret.best_timestep}, with added noise. If two rules "
        "agree, they see the same thing; this does not make them right.",
        f"Yes, with labels, see above. Also without labels, because the check looks for clusters: {quoted(blind)}. "
        "If the clusters were not the classes, the audit would not notice.",
        f"Label {FEW_LABELED} images: with labels the default rule is a different one (`aselect select`), and the "
        "audit is a measurement instead of a second opinion.",
    )


MODES = {
    "flat": Mode("A flat curve", measure_flat, tell_flat),
    "massive": Mode("Massive activations", measure_massive, tell_massive),
    "few": Mode("Too few images", measure_few, tell_few),
    "foreign": Mode("Images of another domain", measure_foreign, tell_foreign),
    "position": Mode("Features that are mostly position", measure_position, tell_position),
    "untrained": Mode("A model that never learned", measure_untrained, tell_untrained),
    "agreement": Mode("Two rules that are wrong together", measure_agreement, tell_agreement),
}
INTRODUCTION = f"""# When not to trust a timestep

Seven ways in which a chosen timestep goes wrong. Each is made from the images that ship with the package and a small
DiT for gray images (the pair `fashion-mnist` of the [evidence](evidence.md)). It comes with the picture that
`aselect audit` draws and with its verdict, word for word. The pictures show the HFR of images and of pure noise, their
difference, the curve of the rule that checks the pick, and how often the picking rule picks each timestep from
resamples of the images. The red line is the pick.

Unless a section says otherwise, HFR picks from {NUM_TIMESTEPS} timesteps and {NUM_IMAGES} images. The command
`python -m benchmarks.selection.failure_modes --model MODEL` makes this page and its pictures.
"""


def overview(measured: dict[str, Measured]) -> str:
    """Table of the verdicts."""
    lines = ["| | verdict with labels | verdict without labels |", "|---|---|---|"]
    for name, each in measured.items():
        title = MODES[name].title
        labeled = next((audit.verdict for audit in each.audits.values() if audit.regret), "-")
        blind = next(audit.verdict for audit in each.audits.values() if audit.regret is None)
        lines.append(f"| [{title}](#{title.lower().replace(' ', '-')}) | {labeled} | {blind} |")
    return "\n".join(lines) + "\n"


def quoted(audit: Audit) -> str:
    return f'"{audit.verdict}: {audit.sentence}"'


def filled(text: str) -> str:
    """Wrap a paragraph."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def points(score: float) -> str:
    """A score in [0, 1] as a percentage."""
    return f"{100 * score:.0f}"


def share(audit: Audit) -> float:
    """Share of the resamples that give the same pick."""
    return (audit.pick_shares or [])[audit.selections["hfr"].timesteps.index(audit.timestep)]


def picture(figure_or_audit: Figure | Audit, path: Path) -> None:
    """Write a picture, smaller and of fewer colors than the audit's own."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "drawn.png"
        if isinstance(figure_or_audit, Audit):
            figure_or_audit.plot(drawn)
        else:
            figure_or_audit.savefig(drawn, dpi=130)
        image = Image.open(drawn).convert("RGB")
        width = min(image.width, WIDTH)
        small = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        small.quantize(COLORS, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def draw_curves(curves: dict[str, tuple[TimestepSelection, TimestepSelection]]) -> Figure:
    """Draw the curves and picks of every rule for the unchanged and the changed model, each on its own scale."""
    figure = Figure(figsize=(8.0, 2.9), layout="constrained")
    for axis, (rule, pair) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for selection, color, label in zip(pair, ("#8b949e", "#cf222e"), ("unchanged", "massive"), strict=True):
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
    sections = [INTRODUCTION, overview(measured)]
    for name, each in measured.items():
        mode = MODES[name]
        seen, noticed, do = mode.tell(each)
        drawn, *_ = each.audits.values()
        said = "\n>\n".join(f"> {line}" for line in drawn.describe().splitlines())
        sections.append(f"## {mode.title}\n\n![{mode.title}](failure-modes/{name}.png)\n\n{filled(seen)}\n\n{said}\n")
        if each.curves:
            sections[-1] += f"\n![Curves of three rules](failure-modes/{name}-curves.png)\n"
        sections[-1] += "\n" + filled(f"**Noticed?** {noticed}") + "\n\n" + filled(f"**What to do.** {do}") + "\n"
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("data/fashion-mnist-dit"), help="see pairs.py")
    sample = Sample(parser.parse_args().model)
    measured = {name: mode.measure(sample) for name, mode in MODES.items()}
    write(measured)


def write(measured: dict[str, Measured]) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, each in measured.items():
        picture(next(iter(each.audits.values())), PICTURES / f"{name}.png")
        if each.curves:
            picture(draw_curves(each.curves), PICTURES / f"{name}-curves.png")
    write_text(DOCS / "failure-modes.md", page(measured))


if __name__ == "__main__":
    main()
