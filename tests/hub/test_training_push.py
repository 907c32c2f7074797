"""A training script that ends on the Hub: its model, figures and pictures, loaded from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from .conftest import ClientProcess, RemoteApi


def train_and_push(folder: Path) -> None:
    """`classify --push_to_hub` on a few images of the sample."""
    from aselect_hf.tasks import CLASSIFICATION
    from aselect_hf.training.arguments import TaskDataArguments, TaskModelArguments, TrainingArguments
    from aselect_hf.training.parsing import parse_arguments
    from aselect_hf.training.task import TaskRun

    flags = [
        "--model_name_or_path=sample", "--dataset_name=sample", "--max_train_samples=24", "--timesteps=3",
        "--validation_split=validation", "--max_eval_samples=10", "--per_device_train_batch_size=8",
        "--max_train_steps=3", "--freeze_backbone", f"--output_dir={folder / 'run'}", f"--cache_dir={folder / 'cache'}",
        "--push_to_hub", "--hub_model_id=ada/trained", "--hub_private_repo",
    ]  # fmt: skip
    TaskRun(
        CLASSIFICATION, *parse_arguments((TaskModelArguments, TaskDataArguments, TrainingArguments), None, flags)
    ).run()


def load_and_classify(repo_id: str, *pictures: str) -> list[Any]:
    """The pipeline on what was pushed: on one image of the sample, or on the pictures given."""
    from transformers import pipeline

    import aselect_hf  # noqa: F401
    from aselect_hf.data.sources import load_images

    return pipeline("image-classification", model=repo_id)(list(pictures) or load_images("sample", "test")[0]["image"])


def test_a_run_ends_on_the_hub(client: ClientProcess, ada: RemoteApi, tmp_path: Path) -> None:
    client.run(train_and_push, tmp_path)
    files = set(ada.list_repo_files("ada/trained"))
    assert {"model.safetensors", "config.json", "README.md", "selection.json", "training.json", "handler.py"} <= files
    assert ada.model_info("ada/trained").private
    card = ModelCard.load(ada.hf_hub_download("ada/trained", "README.md"))
    assert card.data.pipeline_tag == "image-classification"
    assert "| accuracy | 0." in card.text
    assert "hub_token" not in card.text
    assert str(tmp_path) not in card.text
    for number, example in enumerate(card.data.to_dict()["widget"], start=1):
        assert example["src"] == f"widget-{number}.png"
        [picture] = client.run(load_and_classify, "ada/trained", ada.hf_hub_download("ada/trained", example["src"]))
        assert [each["label"] for each in picture] == [each["label"] for each in example["output"]]
        expected = [each["score"] for each in example["output"]]
        assert [each["score"] for each in picture] == pytest.approx(expected, abs=2e-3)
    assert number == 3
    scores = client.run(load_and_classify, "ada/trained")
    assert sum(score["score"] for score in scores) == pytest.approx(1, abs=0.6)


def pretrain_and_push(folder: Path) -> None:
    """`pretrain --push_to_hub` on a few images of the sample."""
    from aselect_hf.training.arguments import DataArguments, PretrainingArguments, PretrainModelArguments
    from aselect_hf.training.parsing import parse_arguments
    from aselect_hf.training.pretrain import pretrain

    flags = [
        "--model_name_or_path=sample", "--dataset_name=sample", "--max_train_samples=16", "--max_train_steps=2",
        "--per_device_train_batch_size=8", f"--output_dir={folder / 'run'}", "--push_to_hub",
        "--hub_model_id=ada/pretrained", f"--cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    pretrain(*parse_arguments((PretrainModelArguments, DataArguments, PretrainingArguments), None, flags))


def test_pretraining_ends_on_the_hub(client: ClientProcess, ada: RemoteApi, tmp_path: Path) -> None:
    client.run(pretrain_and_push, tmp_path)
    assert {"model.safetensors", "README.md", "training.json"} <= set(ada.list_repo_files("ada/pretrained"))
