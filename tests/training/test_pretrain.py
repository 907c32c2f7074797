"""Pretraining on a small folder: it learns, resumes exactly, and leaves a loadable checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from aselect_hf import ASelectDiTModel
from aselect_hf.training.arguments import DataArguments, PretrainModelArguments, TrainingArguments
from aselect_hf.training.draws import SampleDraws
from aselect_hf.training.pretrain import DenoisingObjective, build_config, pretrain

OVERRIDES = (
    "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,mlp_ratio=2,patch_size=4,sample_size=8,num_channels=1,"
    "learned_sigma=false,num_condition_classes="
)


@pytest.fixture
def run(train_dir, tmp_path):
    def run(name: str, classes: int = 0, log_icr: int | None = None, **training) -> ASelectDiTModel:
        options = {"per_device_train_batch_size": 8, "max_train_steps": 6, "learning_rate": 1e-2, "ema_decay": 0.5}
        return pretrain(
            PretrainModelArguments(config_overrides=OVERRIDES + str(classes), log_icr=log_icr),
            DataArguments(train_dir=str(train_dir), cache_dir=str(tmp_path / "cache")),
            TrainingArguments(output_dir=str(tmp_path / name), logging_steps=1, **(options | training)),
        )

    return run


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_loss_falls_and_the_checkpoint_loads(run, tmp_path):
    model = run("run", max_train_steps=60)
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    losses = [entry["loss"] for entry in record["history"]]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    assert record["arguments"]["learning_rate"] == 1e-2
    loaded = ASelectDiTModel.from_pretrained(tmp_path / "run")
    assert torch.equal(weights(loaded), weights(model))
    assert (tmp_path / "run" / "preprocessor_config.json").is_file()


def test_icr_is_logged_and_changes_nothing_else(run, tmp_path, capsys):
    plain, logged = run("plain"), run("logged", log_icr=4)
    assert torch.equal(weights(plain), weights(logged))
    history = json.loads((tmp_path / "logged" / "training.json").read_text())["history"]
    measured = {entry["step"]: entry["icr"] for entry in history if "icr" in entry}
    assert list(measured) == [4, 6]
    assert all(0 <= value <= 1 for value in measured.values())
    assert f"step 6: ICR {measured[6]:.4f} of blocks." in capsys.readouterr().out
    run("resumed", log_icr=4, checkpointing_steps=4, max_train_steps=6)
    run("resumed", log_icr=4, resume_from_checkpoint="latest")
    again = json.loads((tmp_path / "resumed" / "training.json").read_text())["history"]
    assert {entry["step"]: entry["icr"] for entry in again if "icr" in entry} == measured


def test_resume_ends_in_the_very_same_weights(run, tmp_path):
    """Stopped after step 4 of 6, in the middle of the second epoch."""
    whole = run("whole")
    run("stopped", checkpointing_steps=2, checkpoints_total_limit=1)
    kept = [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")]
    assert kept == ["checkpoint-6"]
    run("resumed", checkpointing_steps=4)
    resumed = run("resumed", resume_from_checkpoint="latest")
    assert torch.equal(weights(resumed), weights(whole))
    record = json.loads((tmp_path / "resumed" / "training.json").read_text())
    assert [entry["step"] for entry in record["history"]] == [1, 2, 3, 4, 5, 6]


def test_accumulation_takes_as_many_optimizer_steps(run, tmp_path):
    run("run", gradient_accumulation_steps=2, max_train_steps=3)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 3


def test_bf16_trains(run, tmp_path):
    model = run("run", mixed_precision="bf16")
    assert model.dtype == torch.float32
    assert torch.isfinite(weights(model)).all()


def test_class_conditional_training_moves_the_class_table(run):
    model = run("run", classes=2)
    assert model.condition_embeddings[0].class_embedding.weight.shape == (3, 16)


def test_labels_out_of_range_are_refused_before_training(run, tmp_path):
    with pytest.raises(ValueError, match=r"num_condition_classes=1 needs labels in 0..0, found 0..1"):
        run("run", classes=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [("hidden=3", "not 'field=value'"), ("hidden_size", "not 'field=value'"), ("hidden_size=30", "multiple of")],
)
def test_bad_overrides_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_config(PretrainModelArguments(config_overrides=overrides))


def test_overrides_may_hold_json():
    schedule = {"type": "flow_matching", "prediction_type": "sample"}
    overrides = f"hidden_size=24,noise_schedule={json.dumps(schedule)},num_attention_heads=3,"
    config = build_config(PretrainModelArguments(config_overrides=overrides))
    assert (config.hidden_size, config.num_attention_heads) == (24, 3)
    assert config.noise_schedule.items() >= schedule.items()


def test_missing_source_or_output(tmp_path):
    with pytest.raises(ValueError, match="--output_dir"):
        pretrain(PretrainModelArguments(), DataArguments(), TrainingArguments())


@pytest.mark.parametrize("schedule", [{}, {"prediction_type": "v_prediction"}, {"type": "flow_matching"}], ids=str)
def test_objective_is_the_mean_squared_error_of_the_target(make_model, normal, schedule):
    """A network that outputs zero has a loss equal to the target's power."""
    model = make_model(noise_schedule=schedule, learned_sigma=False)
    for parameter in model.final_layer.parameters():
        parameter.data.zero_()
    pixels = normal(64, 2, 8, 8)
    batch = {"pixel_values": pixels, "labels": torch.zeros(64).long()}
    loss = DenoisingObjective(model)(batch, SampleDraws(0, 0, range(64)))["loss"]
    expected = {"type": 1.0, "prediction_type": 1.0}.get(next(iter(schedule), "prediction_type"))
    expected = 2.0 if schedule.get("type") == "flow_matching" else expected
    assert loss.item() == pytest.approx(expected, rel=0.1)
