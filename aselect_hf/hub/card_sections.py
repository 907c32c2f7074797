"""The text of a card: `templates/model_card.md`, and the values filled into it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from aselect_hf.audit import Audit
from aselect_hf.conversion.licenses import normalize_license
from aselect_hf.hub.card import CardContent
from aselect_hf.hub.licenses import base_license, special_terms
from aselect_hf.hub.results import EvaluationResult
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.reporting.markdown import Markdown, code
from aselect_hf.selection import TimestepSelection
from aselect_hf.selection.rules import RULES
from aselect_hf.tasks import FEATURES
from aselect_hf.versions import installed_versions

TEMPLATES = Path(__file__).parent / "templates"
MAX_CLASSES = 20


def render_card(content: CardContent) -> ModelCard:
    """The card: metadata in YAML, then the text."""
    config, selection = content.config, content.selection
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=Markdown.escape,
    )
    text = environment.get_template("model_card.md").render(
        name=content.name,
        config=config,
        task=content.task,
        schedule=content.schedule,
        introduction=introduction(content),
        facts=list(facts(content)),
        repo_id=Markdown(json.dumps(content.repo_id)),
        verbatim=Markdown,
        feature_shape=f"1, {config.num_patches}, {config.feature_width(str(config.feature))}",
        selection=selection,
        selection_facts=selection_facts(selection) if selection else [],
        explanation=explanation(selection) if selection else "",
        audit=content.audit,
        audit_facts=audit_facts(content.audit) if content.audit else [],
        results=content.results,
        protocols=protocols(content.results),
        comparison=Markdown(content.comparison.markdown().strip()) if content.comparison else "",
        training=content.training,
        training_summary=training_summary(content.training or {}),
        training_arguments=training_arguments(content.training or {}),
        special_terms=special_terms(config),
        base_license=base_license(config),
        has_processor=content.has_processor,
        space=Markdown(content.repo_id) if content.space else "",
        versions=", ".join(f"{name} {number}" for name, number in installed_versions().items()),
    )
    return ModelCard(f"---\n{content.metadata().to_yaml()}\n---\n\n{text}")


def introduction(content: CardContent) -> Markdown:
    """What the model is, where its weights are from, and what it reads."""
    config = content.config
    origin = Markdown()
    if config.base_model:
        link = Markdown(", with weights from [{0}](https://huggingface.co/{1})")
        origin = link.format(config.base_model, Markdown(config.base_model))
    names, timesteps = content.inputs_of_head
    block = max(config.resolve_feature(name).block for name in names)
    at = f"timestep t = {timesteps[0]}; one forward pass"
    if len(timesteps) > 1:
        at = f"timesteps t = {', '.join(map(str, timesteps))}; one forward pass for each"
    read = Markdown(", ").join(map(code, names)) + (" are the features" if len(names) > 1 else " is the feature")
    text = Markdown(
        "{} a Diffusion Transformer{}. Images are mixed with fixed noise at {} runs up to block {}, and {}."
    )
    return text.format(content.task.introduction.format(classes=config.num_labels), origin, at, block, read)


def facts(content: CardContent) -> Iterator[tuple[str, str]]:
    """Rows of the table at the top."""
    config, schedule, t = content.config, content.schedule, content.timestep
    chosen = Markdown("given" if config.fixed_to else "not selected: a tenth of the schedule")
    if content.selection:
        chosen = "chosen by " + code(content.selection.method)
    names = list((config.id2label or {}).values())
    if content.task is not FEATURES and len(names) <= MAX_CLASSES:
        yield "classes", Markdown(", ").join(names)
    yield "timestep", Markdown("t = {} of 0..{} ({})").format(t, schedule.num_train_timesteps - 1, chosen)
    if config.fixed_to:
        yield "fixed", fixed_fact(config)
    noise = f"sigma = {schedule.sigma(t):.4f}, alpha = {schedule.alpha(t):.4f}, log-SNR = {schedule.log_snr(t):.2f}"
    yield "noise level", noise
    width = config.feature_width(str(config.feature))
    yield "feature", code(config.feature) + f", {config.num_patches} tokens of width {width}"
    averaged = f", averaged over {config.num_noise_draws} draws" if config.num_noise_draws > 1 else ""
    stored = "part of the position embedding" if config.fixed_to else "stored in the checkpoint"
    yield "noise draw", f"seed {config.noise_seed}{averaged}, {stored}"
    yield "input", input_fact(config)
    depth = f"{config.num_hidden_layers} blocks"
    if config.fixed_to:
        depth = f"the first {config.num_kept_layers} of {depth}"
    size = f"{content.num_parameters / 1e6:,.1f} M parameters in total"
    yield "network", f"{depth}, {config.network}, {size}"
    if content.license:
        inherited = content.license == normalize_license(config.base_model_license)
        identifiers = [content.license] if isinstance(content.license, str) else content.license
        named = ", ".join([*identifiers, *content.license_details.values()])
        yield "license", named + (" (the base model's)" if inherited else "")


def fixed_fact(config: NoisyBackboneConfig) -> str:
    """What the weights of a model with a fixed timestep contain."""
    fixed, null_class = config.fixed_to or {}, config.null_class
    condition = "the null class" if fixed["class_label"] in (None, null_class) else f"class {fixed['class_label']}"
    if null_class is None:
        condition = "prompt"
    names = Markdown(", ").join(map(code, fixed["features"]))
    folded = Markdown("timestep, noise and {} are folded into the weights, which leaves a plain {} that computes {}")
    return folded.format(condition, config.folded_network, names)


def input_fact(config: NoisyBackboneConfig) -> Markdown:
    """Size and kind of the input."""
    side = config.image_size
    if config.vae_config is None:
        return Markdown(f"{side} x {side} pixels, {config.num_channels} channel(s), in [-1, 1]")
    vae = code(config.vae_config.get("_class_name", "AutoencoderKL"))
    size = f"{config.num_channels} x {config.sample_size} x {config.sample_size}"
    return Markdown("{0} x {0} pixels in [-1, 1], encoded to {1} latents by the included {2}").format(side, size, vae)


def selection_facts(selection: TimestepSelection) -> list[tuple[str, str]]:
    """How the timestep was chosen, and at what cost."""
    options = [code(f"{name}={value}") for name, value in selection.options.items() if value is not None]
    method = code(selection.method) + (" with " if options else "") + Markdown(", ").join(options)
    rows: list[tuple[str, str]] = [("method", method)]
    if selection.timesteps:
        first, last = selection.timesteps[0], selection.timesteps[-1]
        scored = len(selection.timesteps)
        candidates = selection.options.get("candidates", scored)
        some = f", {scored} of them scored" if scored < candidates else ""
        rows.append(("candidates", f"{candidates} timesteps{some}, {first} to {last}"))
    if selection.num_images:
        rows.append(("images", f"{selection.num_images:,}, noise seed {selection.seed}"))
    if selection.scores:
        best = selection.timesteps.index(selection.timestep)
        score = f"{selection.scores[best]:.4f} ± {1.96 * selection.standard_errors[best]:.4f} (95 %)"
        rows.append((f"{selection.score_name} at t = {selection.timestep}", score))
    if selection.fusion:
        rows.append(("several timesteps", selection.fusion))
    cost = selection.cost
    if cost.forward_passes:
        seconds = f"{cost.seconds:,.1f} s, {cost.flops / 1e9:,.0f} GFLOP"
        rows.append(("cost", f"{cost.forward_passes:,} forward passes, {seconds}"))
    return rows


def audit_facts(audit: Audit) -> list[tuple[str, str]]:
    """The evidence for the verdict on the timestep."""
    rows: list[tuple[str, str]] = [("picked by", code(audit.method))]
    rows.append(("checked by", code(audit.checked_by) + f" on {audit.checked.num_images:,} images"))
    if regret := audit.regret:
        lost = f"{regret.estimate:.1f} points, between {regret.lower:.1f} and {regret.upper:.1f} (95 % each)"
        rows.append((f"lost against the best of {len(audit.checked.timesteps)} timesteps", lost))
        rows.append(("accepted loss", f"{audit.tolerance:g} points"))
    if audit.untrained is not None:
        scores = f"{100 * max(audit.checked.scores):.1f} % against {100 * audit.untrained:.1f} %"
        rows.append(("best probe score, against an untrained network at the same t", scores))
    if audit.rank_correlation is not None:
        rows.append(("rank correlation of the two curves", f"{audit.rank_correlation:.2f}"))
    if audit.pick_shares is not None:
        share = audit.pick_shares[audit.selections["hfr"].timesteps.index(audit.timestep)]
        rows.append(("resampled image sets that give the same pick", f"{share:.0%}"))
    return rows


def protocols(results: Sequence[EvaluationResult]) -> list[tuple[str, str]]:
    """Each protocol with the figures measured by it."""
    labels: dict[str, list[str]] = {}
    for result in results:
        labels.setdefault(result.protocol.rstrip("."), []).append(f"{result.label} ({result.dataset})")
    return [(protocol, ", ".join(names)) for protocol, names in labels.items()]


def training_summary(record: dict[str, Any]) -> str:
    """Steps, seconds and final loss, if known."""
    parts = []
    if record.get("steps"):
        parts.append(f"{record['steps']:,} optimizer steps")
    if record.get("seconds"):
        parts.append(f"{record['seconds']:,.0f} seconds")
    losses = [entry["loss"] for entry in record.get("history", ()) if "loss" in entry]
    if losses:
        parts.append(f"final loss {losses[-1]:.4f}")
    return ", ".join(parts) + "." if parts else ""


def training_arguments(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments that were given."""
    given = record.get("arguments", {})
    return [(code(name), value) for name, value in given.items() if value not in (None, "")]


def explanation(selection: TimestepSelection) -> str:
    """What the rule does and which labels it used; for an unknown rule, what was scored."""
    rule = RULES.get(selection.method)
    if rule is None:
        return f"The candidates were scored by {selection.score_name}; the timestep with the highest score was chosen."
    if not rule.runs:
        return rule.explanation
    used = {"none": "No labels were used.", "few": "A few labels were used.", "all": "All labels were used."}
    return f"{rule.explanation} {used[rule.labels]}"
