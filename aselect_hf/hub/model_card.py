"""The card of a pushed model: metadata and text from its config, selection, results and training record.

The text is `templates/model_card.md`; its generated parts lie between markers, see `card_merge.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from typing_extensions import TypedDict

from aselect_hf.audit import Audit
from aselect_hf.compare.table import Comparison
from aselect_hf.conversion.licenses import License, normalize_license
from aselect_hf.files import check_types
from aselect_hf.hub.card_merge import SAMPLE_PICTURES
from aselect_hf.hub.examples import Example
from aselect_hf.hub.licenses import inherited_license
from aselect_hf.hub.redaction import publishable
from aselect_hf.hub.results import EvaluationResult, is_hub_id, results_of
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.reporting.markdown import Markdown, code
from aselect_hf.selection import TimestepSelection
from aselect_hf.selection.criterion import LABELLED
from aselect_hf.versions import installed_versions

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
TASKS = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
}
AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "image-segmentation": "AutoModelForSemanticSegmentation",
    "image-feature-extraction": "AutoModel",
}
OUTPUTS = {
    "image-classification": ("model(**inputs).logits.softmax(-1)", "probability of each class"),
    "image-segmentation": ("model(**inputs).logits", "(1, classes, height, width)"),
    "image-feature-extraction": ("model(**inputs).last_hidden_state", "({shape}): the chosen feature"),
}
HANDLER_OUTPUTS = {
    "image-classification": " and answers with labels and scores",
    "image-segmentation": " and answers with one mask a class",
    "image-feature-extraction": " and answers with its feature vector",
}
TAGS = ["diffusion-transformer", "timestep-selection", "aselect_dit"]
WIDGET = [
    {"src": f"{SAMPLE_PICTURES}/{name}.jpg", "example_title": name.capitalize()}
    for name in ("tiger", "teapot", "palace")
]
MAX_CLASSES = 20
LOCAL_ARGUMENTS = ("output_dir", "train_dir", "validation_dir", "resume_from_checkpoint", "cache_dir")


class TrainingRecord(TypedDict, total=False):
    """What a card reads of a training's record."""

    arguments: dict[str, Any]
    steps: int
    seconds: float
    history: list[dict[str, float]]


@dataclass
class CardContent:
    """Everything a card tells.

    Args:
        config: of the model.
        repo_id: where it will be pushed.
        architecture: class name of the model, which decides its task.
        num_parameters: of the whole model, its VAE included.
        selection: how the timestep was chosen; default what `config.selection` remembers.
        results: figures of this checkpoint.
        comparison: of strategies; its row of this checkpoint's timestep joins `results` where `dataset` is given.
        dataset: Hub id of the data set of the comparison.
        training: record of a training run: `{"arguments": {...}, "steps": ..., "seconds": ..., "history": [...]}`.
        audit: of the timestep.
        license: claimed by the author; default that of the base model.
        files: names of the files beside the card, to which a license's link may point.
        examples: pictures beside the card with the model's answers, for the page on the Hub.

    Raises:
        ValueError: a license freer than the base model's, a selection or an audit of another timestep or feature than
            the config's, a base model that is not a Hub id.
    """

    config: NoisyBackboneConfig
    repo_id: str
    architecture: str
    num_parameters: int
    selection: TimestepSelection | None = None
    results: list[EvaluationResult] = field(default_factory=list)
    comparison: Comparison | None = None
    dataset: str | None = None
    training: dict[str, Any] | None = None
    audit: Audit | None = None
    license: License | None = None
    files: Collection[str] = ()
    examples: list[Example] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        self.selection, self.comparison, self.dataset, self.audit = publishable(
            (self.selection, self.comparison, self.dataset, self.audit)
        )
        self.results = [result.public() for result in self.results]
        if self.training is not None:
            _check("training", self.training, TrainingRecord)
            self.training = publishable_training(self.training)
        if config.base_model and not is_hub_id(config.base_model):
            raise ValueError(f"config.base_model must be the id of a model on the Hub, got {config.base_model!r}")
        self.license = inherited_license(config.base_model_license, self.license)
        if self.selection is None:
            if selection := TimestepSelection.from_config(config):
                _check("config.selection", asdict(selection), TimestepSelection)
            self.selection = publishable(selection)
        elif (self.selection.timestep, self.selection.feature) != (config.timestep, config.feature):
            raise ValueError(
                f"selection chose t = {self.selection.timestep} of {self.selection.feature}, but the config has "
                f"t = {config.timestep} of {config.feature}: call selection.apply(model) first"
            )
        if self.audit is not None:
            audited = self.audit.picked
            if (audited.timestep, audited.feature) != (config.timestep, config.feature):
                raise ValueError(
                    f"audit is of t = {audited.timestep} of {audited.feature}, but the config has t = "
                    f"{config.timestep} of {config.feature}: audit that one, with `aselect audit --selection`"
                )
        if self.comparison is not None:
            if self.dataset is None:
                logger.warning("the comparison is shown in the card; name its dataset to put it into the metadata too")
            self.results = [*self.results, *results_of(self.comparison, config, self.dataset)]

    @property
    def name(self) -> str:
        return self.repo_id.rpartition("/")[2]

    @property
    def task(self) -> str:
        """The pipeline that runs this model."""
        return next(
            (task for suffix, task in TASKS.items() if self.architecture.endswith(suffix)), "image-feature-extraction"
        )

    @property
    def has_processor(self) -> bool:
        return self.config.takes_pictures

    @property
    def timestep(self) -> int:
        """The chosen timestep, or the one that the model falls back to."""
        return self.config.timestep if self.config.timestep is not None else self.schedule.num_train_timesteps // 10

    @property
    def inputs_of_head(self) -> tuple[list[str], list[int]]:
        """Features and timesteps that the model reads: those of its head, or the chosen ones."""
        names, timesteps = [str(self.config.feature)], [self.timestep]
        if self.task != "image-feature-extraction":
            names = getattr(self.config, "head_features", None) or names
            timesteps = getattr(self.config, "head_timesteps", None) or timesteps
        return names, timesteps

    @cached_property
    def license_details(self) -> dict[str, str]:
        """Name and link of a license that the Hub knows as `other`; a link to a file only where that file is."""
        if self.license != "other":
            return {}
        name, link = self.config.base_model_license_name, self.config.base_model_license_link
        if link and "://" not in link and link.removeprefix("./") not in self.files:
            logger.warning(
                "the base model's license lies in %s, which is not beside the model: the link is left out", link
            )
            link = None
        return {key: text for key, text in (("license_name", name), ("license_link", link)) if text}

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_dict(self.config.noise_schedule or {})

    def card(self) -> ModelCard:
        """Render the card: metadata in YAML, then the text."""
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
            keep_trailing_newline=True,
            finalize=Markdown.escape,
        )
        text = environment.get_template("model_card.md").render(
            name=self.name,
            introduction=self._introduction(),
            facts=list(self._facts()),
            convention=self._convention(),
            python_example=self._python_example(),
            pipeline_example=self._pipeline_example(),
            selection=self._selection(),
            audit=self._audit(),
            results=self.results,
            protocols=self._protocols(),
            comparison=Markdown(self.comparison.markdown().strip()) if self.comparison else "",
            training=self._training(),
            has_processor=self.has_processor,
            handler_output=HANDLER_OUTPUTS[self.task],
            limits=list(self._limits()),
            versions=", ".join(f"{name} {number}" for name, number in installed_versions().items()),
        )
        return ModelCard(f"---\n{self._metadata().to_yaml()}\n---\n\n{text}")

    def _metadata(self) -> ModelCardData:
        published = [result for result in self.results if result.on_hub]
        trained_on = (self.training or {}).get("arguments", {}).get("dataset_name") or ""
        trained_on = trained_on if "/" in trained_on else ""  # a bare name may be a folder's, whose path was removed
        candidates = [trained_on, self.dataset, *(result.dataset for result in self.results)]
        optional: dict[str, Any] = {
            "license": self.license,
            **self.license_details,
            "base_model": self.config.base_model,
            "base_model_relation": "finetune" if self.config.base_model else None,
            "datasets": sorted({name for name in candidates if name and is_hub_id(name)}),
            "metrics": sorted({result.metric for result in published}),
            "eval_results": [result.to_eval_result() for result in published],
            "widget": self.examples or (WIDGET if self.has_processor else None),
        }
        return ModelCardData(
            library_name="transformers",
            pipeline_tag=self.task,
            tags=list(TAGS),
            model_name=self.name if published else None,
            **{name: value for name, value in optional.items() if value},
        )

    def _introduction(self) -> Markdown:
        config = self.config
        purpose = {
            "image-classification": f"An image classifier of {config.num_labels} classes on",
            "image-segmentation": f"A semantic segmenter of {config.num_labels} classes on",
            "image-feature-extraction": "A vision backbone:",
        }[self.task]
        origin = Markdown()
        if config.base_model:
            link = Markdown(", with weights from [{0}](https://huggingface.co/{1})")
            origin = link.format(config.base_model, Markdown(config.base_model))
        names, timesteps = self.inputs_of_head
        block = max(config.resolve_feature(name).block for name in names)
        at = f"timestep t = {timesteps[0]}, one forward pass"
        if len(timesteps) > 1:
            at = f"timesteps t = {', '.join(map(str, timesteps))}, one forward pass each"
        read = Markdown(", ").join(map(code, names)) + (" are the features" if len(names) > 1 else " is the feature")
        return (
            Markdown(purpose)
            + " a Diffusion Transformer"
            + origin
            + ". An image is mixed with a fixed draw of noise to "
            f"{at} runs up to block {block}, and " + read + "."
        )

    def _facts(self) -> Iterator[tuple[str, str]]:
        config, schedule, t = self.config, self.schedule, self.timestep
        chosen = Markdown("given" if config.fixed_to else "not selected: a tenth of the schedule")
        if self.selection:
            chosen = "chosen by " + code(self.selection.method)
        names = list((config.id2label or {}).values())
        if self.task != "image-feature-extraction" and len(names) <= MAX_CLASSES:
            yield "classes", Markdown(", ").join(names)
        yield "timestep", Markdown("t = {} of 0..{} ({})").format(t, schedule.num_train_timesteps - 1, chosen)
        if config.fixed_to:
            yield "fixed", self._fixed(config.fixed_to)
        noise = f"sigma = {schedule.sigma(t):.4f}, alpha = {schedule.alpha(t):.4f}, log-SNR = {schedule.log_snr(t):.2f}"
        yield "noise there", noise
        width = config.feature_width(str(config.feature))
        yield "feature", code(config.feature) + f", {config.num_patches} tokens of width {width}"
        averaged = f", averaged over {config.num_noise_draws} draws" if config.num_noise_draws > 1 else ""
        stored = "part of the position embedding" if config.fixed_to else "stored in the checkpoint"
        yield "noise draw", f"seed {config.noise_seed}{averaged}, {stored}"
        side = config.image_size
        if config.vae_config is None:
            yield "input", Markdown(f"{side} x {side} pixels, {config.num_channels} channel(s), in [-1, 1]")
        else:
            vae = config.vae_config.get("_class_name", "AutoencoderKL")
            size = f"{config.num_channels} x {config.sample_size} x {config.sample_size}"
            encoded = Markdown("{0} x {0} pixels in [-1, 1], encoded to {1} latents by the {2} inside")
            yield "input", encoded.format(side, size, code(vae))
        depth = f"{config.num_hidden_layers} blocks"
        if config.fixed_to:
            depth = f"the first {config.num_kept_layers} of {depth}"
        yield (
            "network",
            f"{depth}, {config.network}, {self.num_parameters / 1e6:,.1f} M parameters in all",
        )
        if self.license:
            inherited = self.license == normalize_license(config.base_model_license)
            identifiers = [self.license] if isinstance(self.license, str) else self.license
            named = ", ".join([*identifiers, *self.license_details.values()])
            yield "license", named + (" (the base model's)" if inherited else "")

    def _fixed(self, fixed: dict[str, Any]) -> str:
        """What a model with a fixed timestep still is."""
        label, null_class = fixed["class_label"], self.config.null_class
        condition = "the null class" if label in (None, null_class) else f"class {label}"
        names = Markdown(", ").join(map(code, fixed["features"]))
        folded = Markdown("timestep, noise and {} are folded into the weights: a plain ViT that computes {} only")
        return folded.format(condition, names)

    def _convention(self) -> Markdown:
        schedule = self.schedule
        axis = Markdown(
            "`t` is the training index of this network's own noise process: 0 is clean, "
            f"{schedule.num_train_timesteps - 1} is noise. `x_t = alpha * clean + sigma * noise`, "
        )
        if schedule.type == "flow_matching":
            steps = schedule.num_train_timesteps
            return axis + Markdown(f"with `sigma = t / {steps}` and `alpha = 1 - sigma` (flow matching).")
        return axis + Markdown("with `alpha² + sigma² = 1` (DDPM).")

    def _python_example(self) -> Markdown:
        auto, (call, comment) = AUTO_CLASSES[self.task], OUTPUTS[self.task]
        width = self.config.feature_width(str(self.config.feature))
        comment = comment.format(shape=f"1, {self.config.num_patches}, {width}")
        if self.has_processor:
            image = ["from PIL import Image"]
            processor = ["processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)"]
            inputs = 'processor(images=Image.open("image.jpg"), return_tensors="pt")'
        else:
            image, processor, side = [], [], self.config.sample_size
            inputs = f'{{"latents": torch.zeros(1, {self.config.num_channels}, {side}, {side})}}  # yours'
        return _code_block(
            "import torch",
            *image,
            f"from transformers import {'AutoImageProcessor, ' if processor else ''}{auto}",
            "",
            f"name = {json.dumps(self.repo_id)}",
            *processor,
            f"model = {auto}.from_pretrained(name, trust_remote_code=True).eval()",
            f"inputs = {inputs}",
            "with torch.inference_mode():",
            f"    output = {call}  # {comment}",
        )

    def _pipeline_example(self) -> Markdown:
        if not self.has_processor:
            return Markdown()
        pool = ", pool=True" if self.task == "image-feature-extraction" else ""
        return _code_block(
            "from transformers import pipeline",
            "",
            f"name = {json.dumps(self.repo_id)}",
            f'pipe = pipeline("{self.task}", model=name, trust_remote_code=True{pool})',
            'output = pipe("image.jpg")',
        )

    def _selection(self) -> dict[str, Any] | None:
        selection = self.selection
        if selection is None:
            return None
        options = [code(f"{name}={value}") for name, value in selection.options.items() if value is not None]
        method = code(selection.method) + (" with " if options else "") + Markdown(", ").join(options)
        facts: list[tuple[str, str]] = [("method", method)]
        if selection.timesteps:
            first, last = selection.timesteps[0], selection.timesteps[-1]
            scored = len(selection.timesteps)
            candidates = selection.options.get("candidates", scored)
            some = f", {scored} of them scored" if scored < candidates else ""
            facts.append(("candidates", f"{candidates} timesteps{some}, {first} to {last}"))
        if selection.num_images:
            facts.append(("images", f"{selection.num_images:,}, noise seed {selection.seed}"))
        if selection.scores:
            best = selection.timesteps.index(selection.timestep)
            score = f"{selection.scores[best]:.4f} ± {1.96 * selection.standard_errors[best]:.4f} (95 %)"
            facts.append((f"{selection.score_name} at t = {selection.timestep}", score))
        cost = selection.cost
        if cost.forward_passes:
            seconds = f"{cost.seconds:,.1f} s, {cost.flops / 1e9:,.0f} GFLOP"
            facts.append(("cost", f"{cost.forward_passes:,} forward passes, {seconds}"))
        return {
            "method": selection.method,
            "explanation": _explain(selection),
            "has_picture": bool(selection.scores),
            "caption": f"{selection.score_name} over the noise axis, the chosen timestep as a line",
            "facts": facts,
        }

    def _audit(self) -> dict[str, Any] | None:
        audit = self.audit
        if audit is None:
            return None
        sentence = Markdown("**{}**: {}").format(audit.verdict.capitalize(), audit.sentence)
        facts: list[tuple[str, str]] = [("picked by", code(audit.method))]
        facts.append(("checked by", code(audit.checked_by) + f" on {audit.checked.num_images:,} images"))
        if regret := audit.regret:
            lost = f"{regret.estimate:.1f} points, between {regret.lower:.1f} and {regret.upper:.1f} (95 % each)"
            facts.append((f"lost against the best of {len(audit.checked.timesteps)} timesteps", lost))
            facts.append(("accepted", f"{audit.tolerance:g} points"))
        if audit.untrained is not None:
            scores = f"{100 * max(audit.checked.scores):.1f} % against {100 * audit.untrained:.1f} %"
            facts.append(("best of the probe, against an untrained network there", scores))
        if audit.rank_correlation is not None:
            facts.append(("rank correlation of the two curves", f"{audit.rank_correlation:.2f}"))
        if audit.pick_shares is not None:
            share = audit.pick_shares[audit.selections["hfr"].timesteps.index(audit.timestep)]
            facts.append(("same pick from other samples of the images", f"{share:.0%}"))
        return {"sentence": sentence, "warnings": audit.warnings, "facts": facts}

    def _protocols(self) -> list[tuple[str, str]]:
        """Each protocol with the figures measured by it."""
        labels: dict[str, list[str]] = {}
        for result in self.results:
            labels.setdefault(result.protocol.rstrip("."), []).append(f"{result.label} ({result.dataset})")
        return [(protocol, ", ".join(names)) for protocol, names in labels.items()]

    def _training(self) -> dict[str, Any] | None:
        if not self.training:
            return None
        record = self.training
        parts = []
        if record.get("steps"):
            parts.append(f"{record['steps']:,} optimizer steps")
        if record.get("seconds"):
            parts.append(f"{record['seconds']:,.0f} seconds")
        losses = [entry["loss"] for entry in record.get("history", ()) if "loss" in entry]
        if losses:
            parts.append(f"final loss {losses[-1]:.4f}")
        given = record.get("arguments", {})
        arguments = [(code(name), value) for name, value in given.items() if value not in (None, "")]
        return {"summary": ", ".join(parts) + "." if parts else "", "arguments": arguments}

    def _limits(self) -> Iterator[str]:
        config = self.config
        again = Markdown(" with `aselect select`")
        again += ", on the checkpoint this one was made from" if config.fixed_to else ""
        if self.selection is None:
            yield "No timestep was selected for this checkpoint: choose one on your images" + again + "."
        elif self.selection.method == "fixed":
            yield "The timestep was given, not chosen by a criterion; another one may suit your images better."
        else:
            yield (
                f"The timestep was chosen on {self.selection.num_images:,} images of one data set; on very different "
                "images choose again" + again + "."
            )
        if config.fixed_to:
            yield (
                f"It takes {config.image_size} x {config.image_size} pixels, and gives what it is fixed to: it cannot "
                "denoise, nor be asked for another timestep, feature, class or noise."
            )
        else:
            yield (
                f"Made for {config.image_size} x {config.image_size} pixels; at other sizes the position embedding is "
                "interpolated, and the noise is another draw of the same seed."
            )
        if config.vae_config is not None:
            yield Markdown(
                "Encoding needs `diffusers`, and with the VAE is a large part of the cost: cache the latents."
            )
        yield "A generative model saw its training images in full: whatever biases they have are in the features."


def _check(name: str, content: Any, kind: Any) -> None:
    try:
        check_types(content, kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _code_block(*lines: str) -> Markdown:
    """Lines of code as they are, for the inside of a fence."""
    return Markdown("\n".join(lines))


def _explain(selection: TimestepSelection) -> str:
    if selection.method == "hfr":
        text = (
            "The High-Frequency Ratio (HFR) is the share of a feature's spectrum, over the patch grid, above a cutoff "
            "frequency. The timestep with the highest score was taken; no labels were used."
        )
        if selection.options.get("noise_correction"):
            text += (
                " Injected noise is broadband and raises the ratio by itself, so the HFR of pure noise of the same "
                "sigma is subtracted from that of the images."
            )
        return text
    if selection.method == "gate":
        return (
            "A gate weighed the candidate timesteps by attention over their mean features and noise levels. It was "
            "trained together with a linear classifier on labeled images, every image seen at "
            f"{selection.options['num_visited']} of the {len(selection.timesteps)} candidates a step, while its "
            "weights were annealed towards a single one; the timestep of the highest weight was taken."
        )
    if selection.method == "grid":
        return "A probe was trained at every candidate; the timestep of the highest validation accuracy was taken."
    if selection.method == "fixed":
        return "The timestep was given."
    labels = "few labels" if selection.method in (*LABELLED, "shortlist") else "no labels"
    return (
        f"The features at every candidate were scored, by {selection.score_name}, with {labels}; the timestep of the "
        "highest score was taken."
    )


def publishable_training(record: dict[str, Any]) -> dict[str, Any]:
    """A training record without what concerns only the machine that ran it: local paths, secrets."""
    arguments = {name: value for name, value in record.get("arguments", {}).items() if name not in LOCAL_ARGUMENTS}
    return publishable(record | {"arguments": arguments})
