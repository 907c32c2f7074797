"""The page `docs/failure-modes.md` and its pictures: what goes wrong with a pick, and what the audit says of it.

    python -m benchmarks.selection.failure_modes

Everything is made from the shipped model and images, the failures by changing them here. Deterministic, on one core a
few minutes. Every figure on the page is taken from the audits that are drawn beside it.
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
NUM_FLAT = 500  # flatness is shown by narrow bounds only
COLORS, WIDTH = 128, 720  # of the pictures
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
    labels = coarse_labels(np.asarray(sample.images.labels), FASHION_GROUPS)
    coarse = ImageData(sample.images.items, labels, name="coarse sample")
    options = {"pool_size": 3, "num_images": NUM_FLAT}
    return Measured(
        {
            "flat": sample.audit(images=coarse, method="hfr", **options),
            "unlabelled": sample.audit(images=sample.unlabelled, pool_size=3),
        }
    )


def measure_massive(sample: Sample) -> Measured:
    inside, earlier = (sample.changed(scale_channel(block)) for block in (FEATURE_BLOCK, MASSIVE_BLOCK))
    audits = {
        "earlier": sample.audit(earlier, method="hfr"),
        "shipped": sample.audit(method="hfr"),
        "inside": sample.audit(inside, method="hfr"),
        "unlabelled": sample.audit(earlier, sample.unlabelled),
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
            "unlabelled": sample.audit(images=ImageData(images.items), selection=picked),
        }
    )


def measure_position(sample: Sample) -> Measured:
    model = sample.changed(scale_positions)
    return Measured({"hfr": sample.audit(model, method="hfr"), "unlabelled": sample.audit(model, sample.unlabelled)})


def measure_untrained(sample: Sample) -> Measured:
    set_seed(1)  # the audit's own untrained network has 0
    model = ASelectDiTModel(sample.model.config).eval()
    return Measured({"hfr": sample.audit(model, method="hfr"), "unlabelled": sample.audit(model, sample.unlabelled)})


def measure_agreement(sample: Sample) -> Measured:
    return Measured(
        {
            "labelled": sample.audit(method="hfr"),
            "unlabelled": sample.audit(images=sample.unlabelled),
            "retrieval": sample.audit(images=sample.unlabelled, method="retrieval"),
        }
    )


def tell_flat(found: Measured) -> tuple[str, str, str]:
    audit = found.audits["flat"]
    scores = audit.checked.scores
    return (
        "The shipped model, and an easy question: garments, trousers, shoes or bags, from features averaged over 3 x 3 "
        f"cells. From t = {audit.checked.timesteps[0]} to {audit.checked.timesteps[-1]} the probe moves by "
        f"{100 * (max(scores) - min(scores)):.1f} points on {audit.checked.num_images} images. HFR falls steeply all "
        "the same: a confident curve is no sign that there is anything to choose.",
        "With labels, yes. Without: "
        f"{quoted(found.audits['unlabelled'])}. Rules without labels know neither the question nor that the "
        "choice makes no difference to it.",
        "Take the cheapest timestep, or the one of your other experiments, and spend the time elsewhere. To learn "
        "whether a small difference is real, label more images: the bounds shrink with the root of their number.",
    )


def tell_massive(found: Measured) -> tuple[str, str, str]:
    shipped, inside = found.audits["shipped"], found.audits["inside"]
    moved = "; ".join(
        f"{rule} from t = {before.timestep} to {after.timestep}" for rule, (before, after) in found.curves.items()
    )
    worst = max(
        abs(a - b) for a, b in zip(shipped.selections["hfr"].scores, inside.selections["hfr"].scores, strict=True)
    )
    return (
        f"Made artificially: in a copy of the shipped model, channel {MASSIVE_CHANNEL} of what the MLP of block "
        f"{MASSIVE_BLOCK} writes is multiplied by {MASSIVE_FACTOR:g}, weights and bias. Large pretrained DiTs grow "
        "such channels by themselves (DiTF). Every later LayerNorm divides by them, so that all others shrink and the "
        f"curves are those of another network. Picks move: {moved}. The same channel made massive in the feature "
        f"itself (block {FEATURE_BLOCK}) changes nothing: HFR counts every channel alike, and the others standardize; "
        f"the two HFR curves differ by at most {worst:.1e}.",
        "With labels, by what the pick loses. The cause is not named: the audit does not look for massive channels. "
        f"Without labels: {quoted(found.audits['unlabelled'])}.",
        "Where rules pick far apart, look at the largest channels of the blocks before the feature. Audit a feature of "
        "an earlier block.",
    )


def tell_few(found: Measured) -> tuple[str, str, str]:
    hfr = found.audits["hfr"]
    return (
        "Four images, no labels, picked by instance retrieval. With four images its score can only be a few numbers; "
        "the lowest panel shows the picks from resamples of the same images: they spread. HFR, which averages over "
        f"many tokens and channels, picks t = {hfr.timestep} in {share(hfr):.0%} of its resamples: **a stable pick is "
        "not a right one**, it is only not a matter of these images.",
        f"Yes. The same four images with HFR as the rule are called {hfr.verdict!r}.",
        f"Give {LEAST_FOR_CLUSTERS} images or more (default: {RULES['consensus'].num_images} for retrieval and "
        f"consensus, {RULES['hfr'].num_images} for HFR); they need no labels. With labels, {FEW_LABELED} or more.",
    )


def tell_foreign(found: Measured) -> tuple[str, str, str]:
    moved, again, blind = (found.audits[name] for name in ("moved", "hfr", "unlabelled"))
    return (
        f"A timestep chosen on Fashion-MNIST, t = {moved.timestep} by a few labels, is used for sine gratings of four "
        f"orientations (made in code). The lowest panel, the rule's curve on *its* images, peaks there; on the "
        f"gratings the probe is best at t = {moved.checked.timestep}, with "
        f"{points(max(moved.checked.scores))} % against "
        f"{points(moved.checked.scores[moved.checked.timesteps.index(moved.timestep)])} %.",
        f"With labels, yes. Without: {quoted(blind)}. That images are foreign is itself not noticed: the audit knows "
        "no others than those that it is given.",
        f"Choose again on your own images (here HFR picks t = {again.timestep}: {again.verdict}), and audit a pick "
        "that came with a checkpoint before you use it: `aselect audit MODEL DATA --selection selection.json`.",
    )


def tell_position(found: Measured) -> tuple[str, str, str]:
    hfr = found.audits["hfr"].selections["hfr"]
    return (
        f"Made artificially: the position embedding of the shipped model times {POSITION_FACTOR:g}. What the feature "
        "shows is where a token lies, whatever the image: the curves of images and of pure noise lie on each other, "
        f"and what is left of HFR after subtraction is at most {max(hfr.scores):.4f}.",
        "Yes, by the share that pure noise has of the HFR, and by an untrained network that does nearly as well. "
        f"Without labels: {quoted(found.audits['unlabelled'])}.",
        "Take another kind of feature, or a later block, where the two curves part; and label some images.",
    )


def tell_untrained(found: Measured) -> tuple[str, str, str]:
    hfr, blind = found.audits["hfr"], found.audits["unlabelled"]
    return (
        "The shipped architecture with random weights. The probe is well above chance "
        f"({points(max(hfr.checked.scores))} % against {points(hfr.chance or 0)} %), because random features keep the "
        "pixels.",
        "With labels, by the last warning: the same probe on another network with random weights does as well "
        f"({points(hfr.untrained or 0)} %). The verdict stays one on timesteps. Without labels nothing is said of the "
        f"model: {quoted(blind)}.",
        "See whether the checkpoint was trained on such images, and whether all of its weights were read. Compare with "
        "raw pixels too, as `aselect compare` always does.",
    )


def tell_agreement(found: Measured) -> tuple[str, str, str]:
    labelled, blind, retrieval = (found.audits[name] for name in ("labelled", "unlabelled", "retrieval"))
    regret = labelled.regret
    assert regret is not None
    return (
        "Nothing was changed here: the shipped model on its own images, all ten classes, token means. HFR and "
        f"instance retrieval (t = {retrieval.timestep}) both prefer the cleanest inputs, where single images are told "
        f"apart best. Classes are told apart best at t = {regret.best_timestep}, with noise on top. That two rules "
        "agree says that they see the same, not that they are right.",
        f"With labels, yes, as above. Without, too, since the check looks for clusters: {quoted(blind)}. Where the "
        "clusters are not the classes, nothing would be noticed.",
        f"Label {FEW_LABELED} images: with labels the default rule is another one (`aselect select`), and the audit "
        "is a measurement instead of a second opinion.",
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

Seven ways in which a pick goes wrong, each made from the model and images that ship with the package, with the picture
that `aselect audit` draws and what it says, word for word. In the pictures: HFR of images and of pure noise, their
difference, the rule that checks, and how often the picking rule picks each timestep from resamples of the images; the
pick is the red line. HFR picks, where nothing else is said.

{NUM_TIMESTEPS} timesteps and {NUM_IMAGES} images where nothing else is said; made, words and pictures, by
`python -m benchmarks.selection.failure_modes`.
"""


def overview(measured: dict[str, Measured]) -> str:
    """The verdicts, in a table."""
    lines = ["| | verdict with labels | without |", "|---|---|---|"]
    for name, each in measured.items():
        title = MODES[name].title
        labelled = next((audit.verdict for audit in each.audits.values() if audit.regret), "-")
        blind = next(audit.verdict for audit in each.audits.values() if audit.regret is None)
        lines.append(f"| [{title}](#{title.lower().replace(' ', '-')}) | {labelled} | {blind} |")
    return "\n".join(lines) + "\n"


def quoted(audit: Audit) -> str:
    return f'"{audit.verdict}: {audit.sentence}"'


def filled(text: str) -> str:
    """A paragraph in lines."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def points(score: float) -> str:
    """A score in [0, 1] in hundredths."""
    return f"{100 * score:.0f}"


def share(audit: Audit) -> float:
    """Of the resamples, in which the pick is the same."""
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
    write_text(DOCS / "failure-modes.md", page(measured))


if __name__ == "__main__":
    main()
