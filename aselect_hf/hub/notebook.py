"""A notebook beside the model, which the Hub offers to open in Colab and Kaggle.

It loads the model, predicts, looks at its features and their curve, and trains a new head on the sample's images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from aselect_hf.hub.card import CardContent
from aselect_hf.tasks import CLASSIFICATION, FEATURES, SEGMENTATION

INSTALL = "install"
"""Tag of the cell that installs the package."""

LOAD = """import torch
import aselect_hf  # registers the model with the Auto classes
from transformers import AutoImageProcessor, {auto_class}

name = {repo_id}
processor = AutoImageProcessor.from_pretrained(name)
model = {auto_class}.from_pretrained(name).eval()
backbone = model.base_model"""
PICTURE = """from aselect_hf.data.sources import load_images

picture = load_images("sample", "test")[0]["image"]  # or PIL.Image.open("yours.jpg")
picture"""
PREDICT = """with torch.inference_mode():
    output = model(**processor(images=picture, return_tensors="pt"))
{answer}"""
STRIP = "aselect_hf.noise_strip(backbone, picture)"
SIMILARITY = """grid = model.config.grid_size
tokens = backbone.extract_features(**processor(images=picture, return_tensors="pt"))[model.config.feature][0, 0]
aselect_hf.similarity_map(tokens, grid, patch=(grid[0] // 2, grid[1] // 2))"""
CURVE = """%matplotlib inline
from aselect_hf.pictures import curve

selection = aselect_hf.TimestepSelection.from_config(model.config)
curve(backbone.noise_schedule, selection=selection, timestep=selection.timestep, label=selection.score_name)"""
TRAIN = """from transformers import AutoModelForImageClassification

data = load_images("sample", "train").shuffle(seed=0).select(range(512))
classes = data.features["label"].names
classifier = AutoModelForImageClassification.from_pretrained(
    name, num_labels=len(classes), ignore_mismatched_sizes=True
)
classifier.freeze_backbone()
optimizer = torch.optim.AdamW(classifier.classifier.parameters(), lr=1e-2)


def batch_of(rows):
    inputs = processor(images=rows["image"], return_tensors="pt")
    return {**inputs, "labels": torch.tensor(rows["label"])}


torch.manual_seed(0)
classifier.train()
for epoch in range(6):
    for rows in data.iter(32):
        loss = classifier(**batch_of(rows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.2f}")"""
TEST = """test = load_images("sample", "test").shuffle(seed=0).select(range(256))
classifier.eval()
with torch.inference_mode():
    right = sum(
        int((classifier(**(batch := batch_of(rows))).logits.argmax(-1) == batch["labels"]).sum())
        for rows in test.iter(32)
    )
accuracy = right / len(test)
print(f"accuracy on {len(test)} test images: {accuracy:.3f}")"""
ANSWERS = {
    CLASSIFICATION: """names = model.config.id2label
shares = output.logits[0].softmax(-1)
{names[int(label)]: round(float(shares[label]), 3) for label in shares.topk(min(5, len(shares))).indices}""",
    SEGMENTATION: "output.logits.shape  # (1, classes, height, width)",
    FEATURES: "output.last_hidden_state.shape  # (1, tokens, width): the chosen feature at the chosen timestep",
}


def notebook(content: CardContent, version: str) -> bytes:
    """The notebook for a model, in nbformat 4.

    Args:
        version: of this package, to install.
    """
    written = [
        {"id": f"cell-{number}", "metadata": {"tags": tags}, "source": text.splitlines(keepends=True), **KINDS[kind]}
        for number, (kind, text, tags) in enumerate(_cells(content, version), start=1)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": written}, indent=1).encode()


KINDS: dict[str, dict[str, Any]] = {
    "markdown": {"cell_type": "markdown"},
    "code": {"cell_type": "code", "execution_count": None, "outputs": []},
}


def _cells(content: CardContent, version: str) -> Iterator[tuple[str, str, list[str]]]:
    """Kind, text and tags of every cell."""
    task = content.task
    yield "markdown", f"# {content.name}\n\nLoad it, predict, look at its features, and train a new head.", []
    yield "code", f'%pip install --quiet "aselect-hf=={version}"', [INSTALL]
    yield "code", LOAD.format(auto_class=task.auto_class, repo_id=json.dumps(content.repo_id)), []
    yield "code", PICTURE, []
    yield "markdown", "## Features" if task is FEATURES else "## Prediction", []
    yield "code", PREDICT.format(answer=ANSWERS[task]), []
    if not content.config.fixed_timestep:
        yield "markdown", "## What noise does\n\nThe noisy input, and below it the feature as colors.", []
        yield "code", STRIP, []
    yield "markdown", "Similarity of the central patch to all others, at the model's own timestep.", []
    yield "code", SIMILARITY, []
    if content.selection is not None and content.selection.scores:
        yield "markdown", "## Why this timestep", []
        yield "code", CURVE, []
    yield "markdown", "## A new head\n\nThe backbone stays as it is. Use images and labels of your own here.", []
    yield "code", TRAIN, []
    yield "code", TEST, []
