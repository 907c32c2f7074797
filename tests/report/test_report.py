"""A report is one file that holds everything, asks for nothing, and shows names as text."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from aselect_hf import audit_timestep, select_timestep
from aselect_hf.compare import compare_strategies
from aselect_hf.data.image_data import ImageData
from aselect_hf.report import write_report

VOID = {"meta", "link", "img", "br", "use"}


class Reader(HTMLParser):
    """Addresses, images, and text by the heading above it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "xlink:href")
        ]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(np.clip(generator.normal(60 + 60 * (i % 2), 20, (8, 8)), 0, 255).astype(np.uint8))
        for i in range(24)
    ]
    names = ["<script>alert(1)</script>", "b & c"]
    return ImageData(pictures, labels=[i % 2 for i in range(24)], label_names=names, name="<i>mine</i>")


@pytest.fixture
def results(make_model, images, tmp_path):
    model = make_model(num_channels=1, timestep=None)
    options = {"timesteps": [0, 100, 500], "cache_dir": tmp_path / "cache", "seed": 0}
    splits = dict.fromkeys(("train", "validation", "test"), images)
    return {
        "selection": lambda: select_timestep(model, images, method="hfr", **options),
        "audit": lambda: audit_timestep(model, images, method="hfr", **options),
        "comparison": lambda: compare_strategies(model, splits, strategies=["hfr", "grid", "fixed"], **options),
    }, model


@pytest.mark.parametrize("kind", ["selection", "audit", "comparison"])
def test_one_file_with_everything(results, images, tmp_path, kind):
    made, model = results
    result = made[kind]()
    path = write_report(tmp_path / "report.html", result, model, images, command="aselect <b>command</b>")
    read = Reader(path.read_text(encoding="utf-8"))
    assert read.open == []
    assert [each for each in read.addresses if not each.startswith(("data:", "#"))] == []
    assert not {"script", "iframe", "object"} & set(read.tags)
    assert (read.tags.count("svg"), "i" in read.tags) == (1, False)
    text = "\n".join(read.words)
    for heading in ("The same images along the noise axis", "Cost", "Protocol", "Versions", "Command"):
        assert heading in read.words
    assert "<i>mine</i>" in text
    assert "aselect <b>command</b>" in text
    assert read.tags.count("img") >= 3 * (2 * 8 + 1)


def test_the_table_has_the_scores(results, images, tmp_path):
    made, model = results
    selection = made["selection"]()
    words = Reader(write_report(tmp_path / "r.html", selection, model, images).read_text(encoding="utf-8")).words
    assert f"{selection.scores[1]:.4g}" in words
    assert f"{selection.cost.forward_passes:,}" in words


def test_a_model_that_takes_no_pictures_has_none_in_its_report(make_model, normal, tmp_path):
    model, images = make_model(timestep=None), ImageData(normal(6, 2, 8, 8), name="tensors")
    selection = select_timestep(model, images, method="hfr", timesteps=[0, 100])
    read = Reader(write_report(tmp_path / "r.html", selection, model, images).read_text(encoding="utf-8"))
    assert (read.tags.count("img"), read.tags.count("svg")) == (0, 1)


def test_only_results_are_reported(make_model, images, tmp_path):
    with pytest.raises(TypeError, match="must be a TimestepSelection, an Audit or a Comparison, got str"):
        write_report(tmp_path / "r.html", "no result", make_model(num_channels=1), images)
    assert not (tmp_path / "r.html").exists()
