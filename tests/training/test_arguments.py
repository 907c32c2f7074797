"""Arguments from flags and files; values out of range are named."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from aselect_hf.hub import push_folder
from aselect_hf.hub.target import PushTarget
from aselect_hf.training import pretrain
from aselect_hf.training.arguments import (
    DataArguments,
    PretrainingArguments,
    PretrainModelArguments,
    TaskDataArguments,
    TaskModelArguments,
    TrainingArguments,
    public_arguments,
)
from aselect_hf.training.parsing import parse_arguments

ALL = (PretrainModelArguments, DataArguments, TrainingArguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1; got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1"),
        ({"max_train_steps": 0}, "max_train_steps must be at least 1"),
        ({"eval_steps": 0}, "eval_steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be greater than 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\); got 1.0"),
        ({"condition_dropout": 1.5}, r"condition_dropout must be in \[0, 1\]"),
        ({"denoising_loss_weight": -1.0}, "denoising_loss_weight must be at least 0"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type must be one of linear, cosine, .*; got 'cosin'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be no, fp16 or bf16; got 'fp8'"),
        ({"checkpointing_steps": "often"}, "checkpointing_steps must be a number of steps or 'epoch'; got 'often'"),
        ({"checkpointing_steps": 0}, "checkpointing_steps must be a number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timestep": 5}, "timestep=5 needs method=fixed, got 'auto'"),
        ({"timestep": 5, "method": "gate"}, "timestep=5 needs method=fixed, got 'gate'"),
        ({"num_visited_timesteps": 3}, "num_visited_timesteps=3 needs method=gate, got 'auto'"),
        (
            {"gate_learning_rate": 0.1, "method": "hfr"},
            "gate_learning_rate=0.1 needs method=ga",
        ),
    ],
    ids=str,
)
def test_an_option_of_another_rule_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TaskModelArguments(**values)
    owner = re.search("needs method=(ga|fixed)", message)[1].replace("ga", "gate")
    assert TaskModelArguments(**values | {"method": owner}).method == owner


def test_tracking_alone_means_all_trackers():
    assert TrainingArguments(with_tracking=True).report_to == "all"
    assert TrainingArguments(with_tracking=True, report_to="wandb").report_to == "wandb"


def test_the_token_is_never_shown():
    args = TrainingArguments(hub_token="hf_secret")
    assert "hf_secret" not in repr(args) + json.dumps(args.public())


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_flags_override_the_file(tmp_path, suffix):
    path = tmp_path / f"run.{suffix}"
    values = {
        "learning_rate": 0.5,
        "random_flip": False,
        "max_train_steps": 7,
        "preset": None,
        "train_dir": "my images",
    }
    text = json.dumps(values) if suffix == "json" else "".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items())
    path.write_text(text)
    _, data, training = parse_arguments(ALL, None, [str(path), "--max_train_steps", "9"])
    assert (data.random_flip, data.train_dir) == (False, "my images")
    assert (training.learning_rate, training.max_train_steps) == (0.5, 9)


def test_yaml_reads_no_and_small_numbers_as_meant(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("mixed_precision: no\nlearning_rate: 1e-3\nwith_tracking: yes\n")
    training = parse_arguments(ALL, None, [str(path)])[2]
    assert (training.mixed_precision, training.learning_rate, training.with_tracking) == ("no", 1e-3, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown argument 'lerning_rate'; did you mean learning_rate"),
        ("xyzzy: 1", "unknown argument 'xyzzy'$"),
        ("[1, 2]", "must hold 'name: value' lines"),
        ("a: [", "cannot be read"),
        ("ema_decay: 2", "ema_decay must be in"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(ALL, None, [str(path)])


def test_missing_file_is_named():
    with pytest.raises(ValueError, match=r"config file nowhere.yaml cannot be read"):
        parse_arguments(ALL, None, ["nowhere.yaml"])


def test_a_wrong_type_in_a_file_ends_like_a_wrong_flag(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("seed: much")
    with pytest.raises(SystemExit):
        parse_arguments(ALL, None, [str(path)])
    assert "argument --seed: invalid int value: 'much'" in capsys.readouterr().err


def test_help_shows_example_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_arguments((PretrainModelArguments, DataArguments, PretrainingArguments), pretrain.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert "    accelerate launch -m aselect_hf.training.pretrain --dataset_name" in text
    assert "(default: 0.0001)" in text
    assert "denoising_loss_weight" not in text


def test_arguments_hold_no_secret_when_they_are_written_or_tracked():
    address = "https://user:s3cr3tWord@host.org/images.parquet?sig=s3cr3tWord"
    groups = (
        TaskModelArguments(model_name_or_path="/home/ada/dit"),
        TaskDataArguments(dataset_name=address, cache_dir="/home/ada/cache"),
        TrainingArguments(output_dir="/home/ada/run", hub_token="hf_s3cr3tWord"),
    )
    values = public_arguments(*groups)
    assert "s3cr3tWord" not in str(values) + str(groups[2].public())
    assert (values["dataset_name"], values["model_name_or_path"]) == (
        "https://host.org/images.parquet",
        "/home/ada/dit",
    )
    assert "hub_token" not in values


@pytest.mark.parametrize(("folder", "name"), [('my "best" run', "my-best-run"), ("<!-- x -->", "x"), ("/", "model")])
def test_a_folder_gives_a_name_that_a_repository_can_have(folder, name):
    assert PretrainingArguments(output_dir=folder).repo_id == name
    assert PretrainingArguments(output_dir=folder, hub_model_id="ada/dit").repo_id == "ada/dit"


@pytest.mark.parametrize("name", ["a b", "../x", "a/b/c", "a--b"])
def test_a_wrong_repository_is_refused_before_training(name):
    with pytest.raises(ValueError, match=r"hub_model_id must be 'name' or 'user/name'"):
        PretrainingArguments(hub_model_id=name)


def test_a_folder_of_images_is_not_named_like_a_data_set_of_the_hub(tmp_path):
    (tmp_path / "flowers").mkdir()
    names = [
        TaskDataArguments(train_dir=str(tmp_path / "flowers")).public_name,
        TaskDataArguments(dataset_name="ada/flowers").public_name,
        TaskDataArguments(dataset_name="sample").public_name,
    ]
    assert names == ["flowers (a local folder)", "ada/flowers", "sample"]


def test_home_is_expanded_where_a_shell_does_not(tmp_path, monkeypatch):
    """In `--option=~/folder` and in a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text("train_dir: ~/photos\noutput_dir: ~/out\n")
    _, data, training = parse_arguments(ALL, None, [str(file), "--output_dir=~/other", "--dataset_name", "~/set"])
    assert (data.train_dir, data.dataset_name) == (str(tmp_path / "photos"), str(tmp_path / "set"))
    assert training.output_dir == str(tmp_path / "other")


def test_what_to_do_on_errors_is_checked():
    with pytest.raises(ValueError, match="on_error must be one of stop, skip; got 'ignore'"):
        DataArguments(on_error="ignore")


@pytest.mark.parametrize("splits", [{"validation_split": "train"}, {"validation_split": "dev", "test_split": "dev"}])
def test_images_that_train_do_not_judge(splits):
    with pytest.raises(ValueError, match=r"are both .(train|dev).: a model cannot be evaluated on images that"):
        TaskDataArguments(dataset_name="sample", **splits)
    assert TaskDataArguments(train_dir="photos", validation_dir="held-out", validation_split="train").validation_dir


TASK = (TaskModelArguments, TaskDataArguments, TrainingArguments)


@pytest.mark.parametrize(
    "flags",
    [
        ["--method=hfr", "--num_images=9", "--label_column=species", "--image_column=photo"],
        ["--timestep_selection=hfr", "--num_selection_images=9", "--label_column_name=species", "--image-column=photo"],
        ["--timestep-selection=hfr", "--num-images=9", "--label-column=species", "--image-column-name=photo"],
    ],
)
def test_an_argument_has_one_meaning_under_all_its_names(tmp_path, flags):
    """Those of `aselect`, with dashes or underscores, and those of earlier versions; in files as well."""
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{flag.removeprefix('--').replace('=', ': ')}\n" for flag in flags))
    for argv in (flags, [str(path)]):
        model, data, _ = parse_arguments(TASK, None, argv)
        assert (model.method, model.num_images) == ("hfr", 9)
        assert (data.label_column_name, data.image_column_name) == ("species", "photo")


def test_a_push_is_told_what_it_accepts():
    args = TrainingArguments(output_dir="runs/x", hub_model_id="ada/x", hub_private_repo=True, push_examples=False)
    options = {"repo_id": "ada/x", "private": True, "token": None, "accept_base_license": False, "examples": False}
    assert args.push_options == options
    accepted = {*inspect.signature(push_folder).parameters, *(each.name for each in fields(PushTarget))}
    assert options.keys() <= accepted
    assert PretrainingArguments(output_dir="runs/x", accept_base_license=True).push_options == {
        "repo_id": "x", "private": None, "token": None, "accept_base_license": True,
    }  # fmt: skip


def test_the_cache_of_a_run_is_that_of_select_timestep():
    assert TaskDataArguments(cache_dir="/scratch").latents_dir == Path("/scratch/latents")
    assert TaskDataArguments().latents_dir is None
