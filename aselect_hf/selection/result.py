"""The outcome of a selection: the timestep, the evidence for it, and its cost."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from transformers import PreTrainedModel

from aselect_hf.files import Record, as_path, atomic_file, write_json
from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.selection.ties import ROUNDING, near_best

FORMAT = 1
APPLIED = (
    "method", "score_name", "options", "num_images", "seed", "timesteps", "scores", "standard_errors", "raw_scores",
    "control_scores",
)  # fmt: skip
"""Fields that `apply` writes into a config."""
FUSED = ("fused_timesteps", "fused_scores")
"""Fields that `apply` writes if several timesteps were chosen together."""

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass
class SelectionCost:
    """Cost of a selection: network runs and counted floating-point operations of all processes together, wall-clock
    seconds on this machine, and the number of processes that shared the work."""

    forward_passes: int
    seconds: float
    flops: float
    processes: int = 1

    def __add__(self, other: SelectionCost) -> SelectionCost:
        return SelectionCost(
            self.forward_passes + other.forward_passes,
            self.seconds + other.seconds,
            self.flops + other.flops,
            max(self.processes, other.processes),
        )


@dataclass
class TimestepSelection(Record):
    """A chosen timestep with its curve.

    Args:
        method: name of the rule.
        feature: `blocks.<i>.<kind>`.
        timestep: the choice, on the axis of `NoiseSchedule`.
        timesteps: the candidates that were scored, ascending.
        scores: one per timestep, higher is better; `score_name` says what they are. Empty for a fixed timestep.
        standard_errors: standard errors of the scores, over images.
        schedule: fields of the model's `NoiseSchedule`.
        num_images: number of images that were used.
        options: all options of the rule, given or default.
        raw_scores, control_scores: HFR of the images and of pure noise at the same sigma; `None` for other methods.
        per_image_scores: `(images, timesteps)`, `None` for images that were not scored; `None` if the method does not
            score single images.
        feature_scores: scores of all candidate features by name; `None` if the feature was given.
        perturbed_timesteps: picks after random relative changes of 1e-5 in the features, about as much as processors
            differ; all equal if the pick is stable. `None` for `hfr`, `grid`, `gate` and `fixed`.
        fused_timesteps: timesteps that were chosen together, `timestep` first; `None` if one was asked for.
        fused_scores: the score after each of them, and, if one more adds nothing significant, the best with it.
    """

    method: str
    feature: str
    timestep: int
    timesteps: list[int]
    scores: list[float]
    standard_errors: list[float]
    cost: SelectionCost
    schedule: dict[str, Any]
    score_name: str = "score"
    options: dict[str, Any] = field(default_factory=dict)
    num_images: int = 0
    seed: int = 0
    model: str = ""
    raw_scores: list[float] | None = None
    control_scores: list[float] | None = None
    per_image_scores: list[list[float | None]] | None = None
    feature_scores: dict[str, list[float]] | None = None
    perturbed_timesteps: list[int] | None = None
    fused_timesteps: list[int] | None = None
    fused_scores: list[float] | None = None

    kind = "timestep selection"
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_dict(self.schedule)

    @property
    def sigma(self) -> float:
        """Noise level of the chosen timestep."""
        return self.noise_schedule.sigma(self.timestep)

    @property
    def scored_all(self) -> bool:
        """Whether the rule scored every candidate on every image, so that the curve is whole."""
        searched = self.options.get("search", "full") != "full" or self.options.get("early_stopping") is not None
        return bool(self.scores) and not searched and "first_timesteps" not in self.options

    @property
    def tied(self) -> bool:
        """Whether there are several candidates and all scores are equal within a relative 1e-5."""
        scale = max(map(abs, self.raw_scores)) if self.raw_scores else None
        return len(self.scores) > 1 and bool(near_best(self.scores, scale).all())

    @property
    def fusion(self) -> str:
        """What further timesteps are worth, in a sentence; empty if none was asked for."""
        if self.fused_timesteps is None or self.fused_scores is None:
            return ""
        scores = [f"{score:.4g}" for score in self.fused_scores]
        if len(self.fused_timesteps) == 1:
            reason = f"{self.score_name} {scores[0]} alone, {scores[-1]} with the best second"
            return f"a second timestep adds nothing significant ({reason})"
        steps = ", ".join(f"t = {t} ({score})" for t, score in zip(self.fused_timesteps, scores, strict=False))
        runs = f"a head that reads them runs the network {len(self.fused_timesteps)} times"
        more = "; one more adds nothing significant" if len(scores) > len(self.fused_timesteps) else ""
        return f"together, with the {self.score_name} after each: {steps}; {runs}{more}"

    @property
    def hangs_on_rounding(self) -> bool:
        """Whether changes as small as rounding give another timestep; see `perturbed_timesteps`."""
        return any(t != self.timestep for t in self.perturbed_timesteps or [])

    def doubts(self) -> list[str]:
        """Reasons to doubt the choice, one phrase each: all candidates have the same score, or rounding decides."""
        doubts = []
        if self.tied:
            doubts.append(
                f"{self.method} cannot choose: all {len(self.scores)} candidates have the same score "
                f"({self.score_name} {self.scores[0]:.4g}), so t = {self.timestep} is no better than the others"
            )
        if self.hangs_on_rounding:
            others = ", ".join(f"t = {t}" for t in sorted(set(self.perturbed_timesteps or []) - {self.timestep}))
            doubts.append(
                f"the pick of {self.method} depends on rounding: relative changes of {ROUNDING:g} in the features give "
                f"{others} instead of t = {self.timestep}"
            )
        return doubts

    def describe(self) -> str:
        """The choice in one line, in all four units of the noise axis, with its `doubts` in short."""
        schedule, t = self.noise_schedule, self.timestep
        tied = "; all candidates have the same score" if self.tied else ""
        shaky = "; this pick depends on rounding" if self.hangs_on_rounding else ""
        return (
            f"t = {t} of {schedule.num_train_timesteps} (alpha {schedule.alpha(t):.3f}, sigma {schedule.sigma(t):.3f}, "
            f"log-SNR {schedule.log_snr(t):.2f}), feature {self.feature}, by {self.method}{tied}{shaky}"
        )

    def save(self, path: str | Path) -> Path:
        """Write as JSON, whole or not at all; `load` reads it back equal."""
        schedule = self.noise_schedule
        axis = {
            name: [_finite(getattr(schedule, name)(t)) for t in self.timesteps]
            for name in ("alpha", "sigma", "log_snr")
        }
        content = {"format": FORMAT} | dataclasses.asdict(self) | {"noise_axis": axis}
        return write_json(path, content)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Rebuild from the fields that `save` writes. Other fields are ignored; fields with a default may be absent."""
        fields = {entry.name: content[entry.name] for entry in dataclasses.fields(cls) if entry.name in content}
        return cls(**fields | {"cost": SelectionCost(**fields["cost"])})

    @classmethod
    def from_config(cls, config: Any) -> TimestepSelection | None:
        """The selection that `apply` wrote into a model's config, without its cost; `None` if there is none."""
        if config.selection is None or config.timestep is None:
            return None
        try:
            return cls(
                feature=config.feature,
                timestep=config.timestep,
                schedule=config.noise_schedule,
                cost=SelectionCost(0, 0.0, 0.0),
                **{name: config.selection[name] for name in APPLIED},
                **{name: config.selection.get(name) for name in FUSED},
            )
        except KeyError as error:
            raise ValueError(f"config.selection has no field {error}: apply a selection again") from error

    def plot(self, path: str | Path) -> Path:
        """Draw the curve with its error band and the chosen timestep, and the raw score and control, if any."""
        from aselect_hf.selection.picture import plot_selection

        with atomic_file(path) as temporary:
            plot_selection(self, temporary)
        return as_path(path)

    def apply(self, model: Model) -> Model:
        """Write the choice into `model.config`, so that it travels with the checkpoint, and return the model.

        Timesteps that were chosen together become `config.head_timesteps`, which heads read side by side. A later
        choice of one timestep removes them again; `head_timesteps` that a user has set stay.

        Raises:
            ValueError: the model has another noise schedule, or no such feature or timestep.
        """
        config = model.config
        if config.noise_schedule != self.schedule:
            raise ValueError("this selection was made for a noise schedule other than the model's")
        if config.fixed_timestep and (self.timestep, self.feature) != (config.timestep, config.feature):
            raise config.fixed_error(f"timestep {self.timestep} of {self.feature}")
        fused = self.fused_timesteps or []
        if config.fixed_timestep and len(fused) > 1:
            raise config.fixed_error(f"timesteps {fused} of {self.feature}")
        config.timestep, config.feature = self.timestep, self.feature
        if fused or (config.selection or {}).get("fused_timesteps"):
            config.head_timesteps = [*fused] if len(fused) > 1 else None
        written = APPLIED + FUSED if fused else APPLIED
        config.selection = {name: getattr(self, name) for name in written}
        config.check_choice()
        return model


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
