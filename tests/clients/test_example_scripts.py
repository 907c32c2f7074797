"""The calls of `run_image_classification.py`, `run_semantic_segmentation.py` and their `_no_trainer` twins.

These examples are not part of transformers' distributions and need torchvision or albumentations, so their calls are
written down here, in their order and with their arguments; the augmentations are numpy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    Trainer,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
)
from transformers.trainer_utils import get_last_checkpoint

CLASSIFIERS = ["ours-classifier", "ours-fixed-classifier", "vit-classifier"]
RELOADED = pytest.param(
    "vit-classifier",
    marks=pytest.mark.xfail(
        reason="transformers 5.23: 'There were missing keys in the checkpoint model loaded'", strict=True
    ),
)
SEGMENTERS = ["ours-segmenter", "segformer"]
LABELS = ["dark", "light"]


@pytest.fixture
def dataset() -> Dataset:
    """32 dark or light images, with masks of their darker half."""
    random = np.random.default_rng(0)
    rows: dict[str, list] = {"image": [], "label": [], "annotation": []}
    for index in range(32):
        values = random.integers(0, 128, (20, 24, 3)) + 127 * (index % 2)
        rows["image"].append(PILImage.fromarray(values.astype(np.uint8)))
        rows["label"].append(index % 2)
        rows["annotation"].append(PILImage.fromarray((values.mean(2) > values.mean()).astype(np.uint8)))
    return Dataset.from_dict(rows, Features(image=Image(), label=ClassLabel(names=LABELS), annotation=Image()))


def pixel_values(image: PILImage.Image, processor: Any) -> torch.Tensor:
    """Resize, to tensor, normalize: what the scripts' transforms do with the processor's sizes and means."""
    size = processor.size
    size = (size["shortest_edge"],) * 2 if "shortest_edge" in size else (size["width"], size["height"])
    values = np.asarray(image.convert("RGB").resize(size), dtype=np.float32) / 255
    return torch.from_numpy((values - processor.image_mean) / processor.image_std).permute(2, 0, 1).float()


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["label"] for example in examples]),
    }


def load(task: Any, folder: Path) -> tuple[Any, Any]:
    label2id, id2label = {name: str(i) for i, name in enumerate(LABELS)}, {str(i): n for i, n in enumerate(LABELS)}
    options: dict[str, Any] = {"cache_dir": None, "revision": "main", "token": None, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(
        folder, num_labels=2, label2id=label2id, id2label=id2label, finetuning_task="image-classification", **options
    )
    model = task.from_pretrained(folder, config=config, ignore_mismatched_sizes=True, **options)
    return model, AutoImageProcessor.from_pretrained(folder, **options)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        logging_strategy="steps",
        logging_steps=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        save_total_limit=3,
        seed=1337,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", [*CLASSIFIERS[:2], RELOADED])
def test_run_image_classification(name: str, accumulation: int, save: Any, dataset: Dataset, tmp_path: Path) -> None:
    """Train, stop after one epoch, resume from the checkpoint: the same model as without the stop, and the best one."""
    save(name, tmp_path / "model")
    split = dataset.train_test_split(0.25, seed=0)

    def trainer(folder: Path) -> Trainer:
        model, processor = load(AutoModelForImageClassification, tmp_path / "model")
        transform = lambda batch: batch | {"pixel_values": [pixel_values(x, processor) for x in batch["image"]]}  # noqa: E731
        return Trainer(
            model=model,
            args=arguments(folder, num_train_epochs=2, gradient_accumulation_steps=accumulation),
            train_dataset=split["train"].with_transform(transform),
            eval_dataset=split["test"].with_transform(transform),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
            processing_class=processor,
            data_collator=collate,
        )

    straight = trainer(tmp_path / "straight")
    result = straight.train()
    assert result.metrics["train_loss"] > 0
    first = sorted((tmp_path / "straight").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    resumed = trainer(tmp_path / "straight")
    resumed.train(resume_from_checkpoint=str(first))
    torch.testing.assert_close(resumed.model.state_dict(), straight.model.state_dict(), rtol=1e-4, atol=1e-4)
    best = straight.state.best_model_checkpoint
    assert best is not None
    straight.save_model()
    straight.save_state()
    metrics = straight.evaluate()
    assert metrics["eval_loss"] == pytest.approx(straight.state.best_metric, abs=1e-5)
    straight.save_metrics("eval", metrics)
    straight.create_model_card(finetuned_from=name, tasks="image-classification", tags=["vision"])
    assert f"base_model: {name}" in (tmp_path / "straight/README.md").read_text()
    assert get_last_checkpoint(str(tmp_path / "straight"))
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "straight")
    assert again.config.id2label == {0: "dark", 1: "light"}
    AutoImageProcessor.from_pretrained(tmp_path / "straight")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_run_image_classification_no_trainer(name: str, save: Any, dataset: Dataset, tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    model, processor = load(AutoModelForImageClassification, tmp_path / "model")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    transform = lambda batch: batch | {"pixel_values": [pixel_values(x, processor) for x in batch["image"]]}  # noqa: E731
    loader = DataLoader(dataset.with_transform(transform), shuffle=True, collate_fn=collate, batch_size=8)
    decayed, plain = [], []
    for key, parameter in model.named_parameters():
        (plain if "bias" in key or "LayerNorm.weight" in key else decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-3
    )
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    accelerator.save_state(tmp_path / "epoch_0")
    trained = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "epoch_0")
    assert all(torch.equal(tensor, trained[key]) for key, tensor in model.state_dict().items())
    model.eval()
    seen = 0
    for batch in loader:
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(dim=-1)
        predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
        assert predictions.shape == references.shape
        seen += len(references)
    assert seen == 32
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        tmp_path / "out", is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(batch["pixel_values"]).logits, model(batch["pixel_values"]).logits)


def masked(batch: dict, processor: Any) -> dict[str, torch.Tensor]:
    images = [pixel_values(image, processor) for image in batch["image"]]
    side = images[0].shape[-2:][::-1]
    masks = [np.asarray(mask.resize(side, PILImage.Resampling.NEAREST)) for mask in batch["annotation"]]
    return {"pixel_values": torch.stack(images), "labels": torch.from_numpy(np.stack(masks)).long()}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_run_semantic_segmentation(name: str, save: Any, dataset: Dataset, tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    model, _ = load(AutoModelForSemanticSegmentation, tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", do_reduce_labels=True)
    split = dataset.train_test_split(0.25, seed=0)
    transform = lambda batch: masked(batch, processor)  # noqa: E731

    @torch.no_grad()
    def compute_metrics(predicted: Any) -> dict[str, float]:
        logits, labels = map(torch.from_numpy, predicted)
        logits = torch.nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear")
        assert processor.do_reduce_labels
        return {"pixel_accuracy": float((logits.argmax(dim=1) == labels).float().mean())}

    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "out", num_train_epochs=1),
        train_dataset=split["train"].with_transform(transform),
        eval_dataset=split["test"].with_transform(transform),
        compute_metrics=compute_metrics,
        processing_class=processor,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_pixel_accuracy"] <= 1
    trainer.create_model_card(finetuned_from=name, tasks="image-segmentation", tags=["vision"])
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    images = AutoImageProcessor.from_pretrained(tmp_path / "out")(dataset[0]["image"], return_tensors="pt")
    found = processor.post_process_semantic_segmentation(loaded(**images), target_sizes=[(20, 24)])
    assert found[0].shape == (20, 24)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_run_semantic_segmentation_no_trainer(name: str, save: Any, dataset: Dataset, tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    model, processor = load(AutoModelForSemanticSegmentation, tmp_path / "model")
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(
        dataset.with_transform(lambda batch: masked(batch, processor)), collate_fn=default_data_collator, batch_size=8
    )
    optimizer = torch.optim.AdamW(list(model.parameters()), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        losses.append(loss.item())
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert np.isfinite(losses).all()
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
    upsampled = torch.nn.functional.interpolate(logits, size=batch["labels"].shape[-2:], mode="bilinear")
    predictions, _ = accelerator.gather_for_metrics((upsampled.argmax(dim=1), batch["labels"]))
    assert predictions.shape == batch["labels"].shape
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "out", save_function=accelerator.save)
    processor.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {"0": "dark", "1": "light"}
