"""The task scripts on the shipped sample: every strategy on both tasks ends in a model that loads and pushes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

from aselect_hf import ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation, ASelectDiTModel
from aselect_hf.conversion import load_model, save_model
from aselect_hf.data.sources import SAMPLE_MODEL, load_images
from aselect_hf.hub.upload import prepare_folder
from aselect_hf.selection import TimestepSelection
from aselect_hf.tasks import CLASSIFICATION, SEGMENTATION
from aselect_hf.training import classify, segment
from aselect_hf.training.arguments import TaskDataArguments, TaskModelArguments, TrainingArguments
from aselect_hf.training.evaluation import HeadEvaluation
from aselect_hf.training.metrics import MeanIoU
from aselect_hf.training.parsing import parse_arguments
from aselect_hf.training.report import RunReport
from aselect_hf.training.task import TaskRun

TASKS = {"classify": CLASSIFICATION, "segment": SEGMENTATION}
CLASSES = {"classify": ASelectDiTForImageClassification, "segment": ASelectDiTForSemanticSegmentation}
ARGUMENTS = (TaskModelArguments, TaskDataArguments, TrainingArguments)
SMALL = [
    "--model_name_or_path", "sample", "--dataset_name", "sample", "--max_train_samples", "48",
    "--validation_split", "validation", "--max_eval_samples", "20", "--timesteps", "3",
    "--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--max_train_steps", "6",
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """`run("classify", *flags, name="run")`: a small run; its report."""

    def run(task: str, *flags: str, name: str = "run"):
        AcceleratorState._reset_state(reset_partial_state=True)
        folders = ["--output_dir", str(tmp_path / name), "--cache_dir", str(tmp_path / "cache")]
        return TaskRun(TASKS[task], *parse_arguments(ARGUMENTS, None, [*SMALL, *folders, *flags])).run()

    return run


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], name: str) -> bool:
    return torch.equal(before[name], after[name])


def check_examples(folder, task):
    """Three small pictures for the page on the Hub, each with what the saved model says of it."""
    content = json.loads((folder / "widget.json").read_text())
    assert content["dataset"] == "sample"
    assert [example["src"] for example in content["examples"]] == [f"widget-{number}.png" for number in (1, 2, 3)]
    pipe = None if task == "segment" else pipeline("image-classification", model=str(folder))
    for example in content["examples"]:
        picture = Image.open(folder / example["src"])
        if pipe is None:
            assert Image.open(folder / example["output"]["url"]).size == picture.size
        else:
            answer = pipe(picture)
            assert [each["label"] for each in answer] == [each["label"] for each in example["output"]]
    assert ModelCard.load(folder / "README.md").data.to_dict()["widget"] == content["examples"]


@pytest.mark.parametrize("strategy", ["hfr", "gate", "grid", "fixed"])
@pytest.mark.parametrize("task", CLASSES)
def test_every_strategy_ends_in_a_model_that_loads(run, tmp_path, task, strategy):
    report = run(task, "--freeze_backbone", "--method", strategy, "--test_split", "test",
                 "--max_test_samples", "15")  # fmt: skip
    folder = tmp_path / "run"
    loaded = CLASSES[task].from_pretrained(folder)
    results = json.loads((folder / "results.json").read_text())
    assert loaded.config.timestep == results["timestep"] == report.selection.timestep
    assert TimestepSelection.load(folder / "selection.json").method == strategy == results["strategy"]
    check_examples(folder, task)
    names = load_images("sample").features["label"].names
    assert list(loaded.config.id2label.values()) == (names if task == "classify" else ["background", *names])
    metric = "accuracy" if task == "classify" else "mean_iou"
    assert 0 <= results["test"][metric] <= 1
    assert results["cost"]["training"]["forward_passes"] >= 48
    assert results["head"]["chosen_among"] == 10
    card = str(prepare_folder(folder, "me/model", dataset=None, license=None).card)
    assert f"{results['test'][metric]:.4f}" in card
    assert "scored once" in card
    for picture in ("history.png", "predictions.png", *(["selection.png"] if strategy != "fixed" else [])):
        assert Image.open(folder / picture).size[0] > 100
    if strategy in ("hfr", "gate"):  # raw and control above the score; HFR above the gate's weights
        assert Image.open(folder / "selection.png").size[1] > 600
    kind = {"classify": "image-classification", "segment": "image-segmentation"}[task]
    output = pipeline(kind, model=str(folder), trust_remote_code=False)(load_images("sample", "test")[0]["image"])
    assert output[0]["label"] in loaded.config.label2id


def test_the_head_of_the_authors_trains(run, tmp_path):
    """With the options of the recipe for Stable Diffusion 3 medium, but narrower and for 150 steps."""
    save_model(ASelectDiTModel.from_pretrained(SAMPLE_MODEL, pooling_width=32), tmp_path / "base")
    flags = ["--model_name_or_path", str(tmp_path / "base"), "--pooling", "transformer", "--head_norm", "none"]
    flags += ["--head_learning_rates", "3e-3", "--head_weight_decays", "1e-3", "--freeze_backbone"]
    run("classify", *flags, "--method", "fixed", "--max_train_steps", "150")
    head = ASelectDiTForImageClassification.from_pretrained(tmp_path / "run").classifier
    assert head.pooling.projection.out_features == 32
    assert isinstance(head.norm.norm, torch.nn.Identity)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["head"]["chosen_among"] == 1
    assert results["validation"]["accuracy"] >= 0.4, "chance is 0.1"


def test_options_of_the_rule_reach_it(run):
    report = run("classify", "--freeze_backbone", "--method", "hfr", "--cutoff", "0.2", "--search", "coarse_to_fine")
    assert report.selection.options.items() >= {"cutoff": 0.2, "search": "coarse_to_fine"}.items()
    assert report.facts.model_args.rule_options == {"cutoff": 0.2, "search": "coarse_to_fine"}


def test_the_feature_is_chosen_together_with_the_timestep(run, tmp_path):
    """And the blocks up to it train, whichever it is."""
    flags = ["--method", "logme", "--feature", "auto", "--kinds", "mlp", "--pool_size", "2"]
    selection = run("classify", *flags, "--denoising_loss_weight", "0").selection
    assert len(selection.feature_scores) == load_model("sample").config.num_hidden_layers
    assert selection.options.items() >= {"feature": "auto", "kinds": ["mlp"], "pool_size": 2}.items()
    loaded = ASelectDiTForImageClassification.from_pretrained(tmp_path / "run")
    assert (loaded.config.feature, loaded.config.timestep) == (selection.feature, selection.timestep)
    before, after = weights(load_model("sample")), weights(loaded.dit)
    block = int(selection.feature.split(".")[1])
    changed = {int(name.split(".")[1]) for name in after if name[:7] == "layers." and not equal(before, after, name)}
    assert changed == set(range(block + 1))


@pytest.mark.parametrize("strategy", ["hfr", "gate"])
def test_a_frozen_backbone_stays_bit_equal(run, tmp_path, strategy):
    run("classify", "--freeze_backbone", "--method", strategy)
    before, after = load_model("sample"), ASelectDiTForImageClassification.from_pretrained(tmp_path / "run").dit
    for name, value in weights(before).items():
        assert torch.equal(value, weights(after)[name]), name


@pytest.mark.parametrize("strategy", ["fixed", "gate"])
def test_fine_tuning_moves_the_whole_backbone_and_logs_both_losses(run, tmp_path, strategy):
    report = run("classify", "--method", strategy, "--logging_steps", "1")
    before = weights(load_model("sample"))
    after = weights(ASelectDiTForImageClassification.from_pretrained(tmp_path / "run").dit)
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert set(still) <= {"position_embedding", "evaluation_noise"}
    losses = [entry for entry in report.record["history"] if "denoising_loss" in entry]
    assert len(losses) == 6
    for entry in losses:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["denoising_loss"], rel=1e-4)


def test_without_the_denoising_loss_what_the_feature_does_not_need_stays(run, tmp_path):
    run("classify", "--denoising_loss_weight", "0", "--feature", "blocks.2.query")
    before = weights(load_model("sample"))
    after = weights(ASelectDiTForImageClassification.from_pretrained(tmp_path / "run").dit)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any(name.startswith("layers.1.mlp") for name in moved)
    assert not any(name.startswith(("layers.3", "layers.2.mlp", "final_layer")) for name in moved)


def test_lora_is_merged_into_an_ordinary_checkpoint(run, tmp_path):
    run("classify", "--lora_rank", "2", "--method", "fixed", "--denoising_loss_weight", "0")
    before = weights(load_model("sample"))
    after = weights(ASelectDiTForImageClassification.from_pretrained(tmp_path / "run").dit)
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {
        f"layers.{block}.attention.{kind}_proj.weight" for block in range(5) for kind in ("q", "k", "v", "o")
    }


@pytest.mark.parametrize("task", CLASSES)
def test_kept_features_change_nothing(run, tmp_path, task):
    """A backbone that runs once an image, mirrored ones included, trains the heads that one run an epoch trains."""
    reports = [run(task, "--freeze_backbone", "--cache_features", keep, name=keep) for keep in ("True", "False")]
    first, second = (weights(CLASSES[task].from_pretrained(tmp_path / keep)) for keep in ("True", "False"))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5)
    assert reports[0].validation == pytest.approx(reports[1].validation, abs=0.06)
    assert not (tmp_path / "True" / ".features").exists()


def test_resumed_run_ends_in_the_very_same_weights(run, tmp_path):
    """Stopped in the second epoch's middle, with heads, gate, both losses and EMA."""
    flags = ["--method", "gate", "--max_train_steps", "9", "--ema_decay", "0.5"]
    whole = run("classify", *flags, name="whole")
    run("classify", *flags, "--checkpointing_steps", "8", name="resumed")
    (tmp_path / "resumed" / "model.safetensors").unlink()
    resumed = run("classify", *flags, "--resume_from_checkpoint", "latest", name="resumed")
    assert resumed.selection.scores == whole.selection.scores
    first, second = (
        weights(ASelectDiTForImageClassification.from_pretrained(tmp_path / x)) for x in ("whole", "resumed")
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_arguments_of_a_run_start_it_again(run, tmp_path):
    first = run("segment", "--freeze_backbone", "--seed", "3", "--head_learning_rates", "1e-3", "1e-2")
    arguments = parse_arguments(
        ARGUMENTS, None, [str(tmp_path / "run" / "training_args.json"), "--output_dir", str(tmp_path / "again")]
    )
    again = TaskRun(SEGMENTATION, *arguments).run()
    assert again.validation == first.validation


def test_folders_of_images_with_masks(tmp_path):
    """`metadata.jsonl`, masks larger than the model's images and of several sizes, class 0 left out."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 5)):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        rows = []
        for index in range(count):
            size = (40 + index, 50)
            mask = np.zeros(size, np.uint8)
            mask[: size[0] // 2] = 1
            mask[size[0] // 2 :, 10:] = 2
            pixels = np.clip(mask * 100 + generator.normal(0, 10, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            Image.fromarray(mask).save(folder / f"{index}_mask.png")
            rows.append({"image_file_name": f"{index}.png", "mask_file_name": f"{index}_mask.png"})
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [
        "--model_name_or_path", "sample", "--train_dir", str(tmp_path / "data"), "--validation_split", "validation",
        "--reduce_labels", "--freeze_backbone", "--method", "hfr", "--max_train_steps", "40",
        "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--output_dir", str(tmp_path / "run"),
        "--cache_dir", str(tmp_path / "cache"),
    ]  # fmt: skip
    report = TaskRun(SEGMENTATION, *parse_arguments(ARGUMENTS, None, flags)).run()
    assert len(report.facts.data.label_names) == 2
    assert report.validation["mean_iou"] > 0.6
    assert set(report.validation) >= {"mean_iou", "pixel_accuracy", "iou_0", "iou_1"}


def test_streaming(run):
    report = run("classify", "--streaming", "--freeze_backbone", "--num_streamed_images", "16")
    assert report.record["steps"] == 6
    assert len(report.facts.data.validation) == 20


def test_tensorboard_gets_scalars_and_pictures(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("segment", "--freeze_backbone", "--report_to", "tensorboard", "--logging_steps", "2")
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out*")).parent)).Reload()
    assert {"loss", "mean_iou"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["predictions"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "nowhere/at-all"], "nowhere/at-all"),
        (["--validation_split", "val"], "has no split 'val'; it has"),
        (["--feature", "blocks.9.query"], "blocks.9.query"),
        (["--label_column_name", "species"], "label_column"),
        (["--freeze_backbone", "--denoising_loss_weight", "1"], "must be 0 with a frozen backbone"),
        (["--head_learning_rates", "1e-3", "1e-2"], "need --freeze_backbone"),
        (["--freeze_backbone", "--lora_rank", "4"], "freeze_backbone and lora_rank cannot be combined"),
        (["--method", "gate", "--head_norm", "batch_norm"], "a gate needs head_norm=layer_norm"),
        (["--method", "guess"], "method must be one of auto, .*hfr.*; got 'guess'"),
        (["--timestep", "5"], "needs method=fixed"),
        (["--method", "grid", "--streaming"], "cannot run with --streaming"),
        (["--timesteps", "a,b"], "timesteps must be integers"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_leave_nothing(run, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run("classify", *flags)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("script", [classify, segment])
def test_help_shows_an_example(script):
    name = script.__name__
    output = subprocess.run([sys.executable, "-m", name, "--help"], capture_output=True, text=True, check=True).stdout
    assert f"accelerate launch -m {name}" in output
    assert "--method" in output
    assert "--timestep_selection" in output


def test_training_goes_on_from_a_task_model(run, tmp_path):
    """Its head is kept where the classes agree."""
    run("classify", "--freeze_backbone", name="first")
    run("classify", "--freeze_backbone", "--model_name_or_path", str(tmp_path / "first"), "--max_train_steps", "1",
        "--head_learning_rates", "1e-9", "--head_weight_decays", "0", name="second")  # fmt: skip
    first, second = (ASelectDiTForImageClassification.from_pretrained(tmp_path / x) for x in ("first", "second"))
    difference = first.classifier.linear.weight - second.classifier.linear.weight
    assert difference.abs().max() < 1e-6
    assert SAMPLE_MODEL.is_dir()
    assert isinstance(first.dit, ASelectDiTModel)


def test_a_mean_over_classes_says_how_many_it_is_over():
    """A class that is neither in the images nor predicted has no IoU; the report counts the others."""
    metrics = [MeanIoU(4, label_names=["a", "b", "c", "d"])]
    metrics[0].add_batch(predictions=torch.tensor([[[0, 1]]]), references=torch.tensor([[[0, 0]]]))
    values = HeadEvaluation._compute(metrics)
    assert (values["mean_iou"], values["num_scored_classes"]) == (0.25, 2)
    assert not {"iou_c", "iou_d"} & values.keys()
    facts = SimpleNamespace(data=SimpleNamespace(label_names=["a", "b", "c", "d"]))
    told = RunReport._scored_classes(SimpleNamespace(facts=facts, test=None, validation=values))
    assert told == {"classes": "mean over 2 of 4; the others neither occur nor are predicted"}
    assert RunReport._scored_classes(SimpleNamespace(facts=facts, test=None, validation={"accuracy": 1.0})) == {}


def test_of_heads_that_differ_by_rounding_every_machine_takes_the_first():
    scores = [{"accuracy": 0.4}, {"accuracy": 0.9}, {"accuracy": 0.9 + 1e-9}]
    assert TaskRun._best_head.fget(SimpleNamespace(task=CLASSIFICATION, scores=scores)) == 1
