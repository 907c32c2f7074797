"""What a round trip keeps beside the weights: the whole scheduler, and the names of the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler, EDMEulerScheduler

from aselect_hf.conversion import convert_checkpoint, load_checkpoint

SCHEDULERS: dict[str, Any] = {
    "defaults": DDIMScheduler(),
    "every option of DDIM": DDIMScheduler(
        beta_schedule="scaled_linear", beta_end=0.03, clip_sample=False, clip_sample_range=2.5, steps_offset=1,
        set_alpha_to_one=False, timestep_spacing="trailing", thresholding=True, dynamic_thresholding_ratio=0.9,
        prediction_type="v_prediction",
    ),
    "explicit betas": DDPMScheduler(trained_betas=np.linspace(0.001, 0.03, 50), num_train_timesteps=50),
    "another sampler": DPMSolverMultistepScheduler(solver_order=3, timestep_spacing="leading", use_karras_sigmas=True),
}  # fmt: skip


def fields_of(scheduler: Any) -> dict[str, Any]:
    fields = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {name: list(value) if isinstance(value, np.ndarray) else value for name, value in fields.items()}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_field_of_the_scheduler_is_kept(make_transformer: Any, tmp_path: Path, scheduler: Any) -> None:
    convert_checkpoint(make_transformer(), tmp_path / "ours", scheduler=scheduler)
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="diffusers")
    back = type(scheduler).from_pretrained(tmp_path / "back" / "scheduler")
    assert fields_of(back) == fields_of(scheduler)


def test_the_models_own_noise_comes_first(make_transformer: Any, tmp_path: Path) -> None:
    """A schedule that was given in place of the scheduler's is what goes back."""
    given = {"beta_schedule": "squaredcos_cap_v2"}
    scheduler = DDIMScheduler(steps_offset=1)
    convert_checkpoint(make_transformer(), tmp_path / "back", to="diffusers", scheduler=scheduler, noise_schedule=given)
    config = DDIMScheduler.from_pretrained(tmp_path / "back" / "scheduler").config
    assert (config.beta_schedule, config.steps_offset) == ("squaredcos_cap_v2", 1)


def test_a_scheduler_of_another_kind_is_refused(make_transformer: Any) -> None:
    with pytest.raises(ValueError, match="EDMEulerScheduler is neither a DDPM scheduler"):
        load_checkpoint(make_transformer(), scheduler=EDMEulerScheduler())
    for name in ("os.system", "DiTPipeline", 5):
        with pytest.raises(ValueError, match="diffusers has no scheduler"):
            load_checkpoint(make_transformer(), scheduler={"_class_name": name})


def sample(pipeline: DiTPipeline) -> np.ndarray:
    import torch

    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    return pipeline([1, 207], generator=torch.Generator().manual_seed(3), **options).images


def test_the_default_sampler_and_the_names_of_the_classes(pipeline_folder: Path, tmp_path: Path) -> None:
    """The scheduler clips its samples, as a default DDIM does, and the classes have names, as the published ones."""
    names = {index: f"name {index}, synonym {index}" for index in range(1000)}
    pipeline = DiTPipeline.from_pretrained(
        pipeline_folder, scheduler=DDIMScheduler(clip_sample_range=0.1), id2label=names
    )
    expected, labels = sample(pipeline), pipeline.labels
    pipeline.register_to_config(id2label={str(index): name for index, name in names.items()})
    pipeline.save_pretrained(tmp_path / "named")
    for source in (tmp_path / "named", pipeline):
        target = tmp_path / type(source).__name__
        convert_checkpoint(source, target / "ours", vae_decoder=True)
        convert_checkpoint(target / "ours", target / "back", to="diffusers")
        back = DiTPipeline.from_pretrained(target / "back")
        assert back.labels == labels
        assert back.get_label_ids(["synonym 207"]) == [207]
        assert np.array_equal(sample(back), expected)
