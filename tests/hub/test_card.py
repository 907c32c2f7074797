"""Cards of pushed models: metadata, text, hand edits, licenses, and what refuses to be pushed at all."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from aselect_hf import select_timestep
from aselect_hf.audit import Audit, audit_timestep
from aselect_hf.audit.regret import Regret
from aselect_hf.compare.table import Comparison, ComparisonRow
from aselect_hf.conversion import save_model
from aselect_hf.hub.card import CardContent, publishable_training
from aselect_hf.hub.card_merge import merge_cards
from aselect_hf.hub.card_sections import render_card
from aselect_hf.hub.examples import may_share
from aselect_hf.hub.licenses import inherited_license
from aselect_hf.hub.redaction import publishable
from aselect_hf.hub.results import EvaluationResult, eval_result_files, is_hub_id
from aselect_hf.hub.upload import count_parameters, prepare_folder, prepare_upload
from aselect_hf.selection import RULES, SelectionCost, TimestepSelection

TRAINING = {
    "arguments": {"dataset_name": "ada/flowers", "learning_rate": 1e-3, "preset": None, "output_dir": "/home/ada/out"},
    "steps": 1200,
    "seconds": 33.4,
    "history": [{"step": 1200, "loss": 0.5}],
}
RESULT = EvaluationResult("ada/flowers", "mean_iou", 0.5, "linear head on 10 images, chosen on 5 others", split="val")
SECTIONS = (
    "How to use it",
    "Why this timestep",
    "Can the timestep be trusted?",
    "Results",
    "Training",
    "Hosting",
    "Limits",
    "Versions",
)
PATTERN = r"""---
.*library_name: transformers.*
---

<!-- aselect:summary:begin -->.*
# dit

A vision backbone: a Diffusion Transformer.* timestep t = \d+; .*`blocks\.1\.query` is the feature\.
.*\| timestep \| t = \d+ of 0\.\.999 \(chosen by `hfr`\) \|
\| noise level \| sigma = 0\.\d+, alpha = \d\.\d+, log-SNR = -?\d+\.\d+ \|
\| feature \| `blocks\.1\.query`, 16 tokens of width 24 \|
\| noise draw \| seed 0, stored in the checkpoint \|
.*`alpha² \+ sigma² = 1` \(DDPM\).*
## How to use it
.*trust_remote_code=True.*pipeline\("image-feature-extraction".*
## Why this timestep
.*!\[HFR minus HFR of pure noise.*\]\(selection\.png\).*
\| images \| 4, noise seed 0 \|.*
## Can the timestep be trusted\?

\*\*(Trust|Uncertain|Do not trust)\*\*: no labels, .*
!\[Curves of HFR, the rule that picked and .*\]\(audit\.png\)
.*\| picked by \| `hfr` \|
\| checked by \| `consensus` on 4 images \|
.*\| resampled image sets that give the same pick \| \d+% \|
.*
- HFR saw only 4 images: give 32 or more
.*- the check has only 4 images: give 128 or more
.*## Results
.*\| mean iou \| 0\.5000 \| \[ada/flowers\]\(https://huggingface\.co/datasets/ada/flowers\) \| val \|
.*Protocol: linear head on 10 images, chosen on 5 others\..*
## Training
.*1,200 optimizer steps, 33 seconds, final loss 0\.5000\..*\| `learning_rate` \| 0\.001 \|.*
## Hosting
.*do not run custom code.*`handler\.py`.*
## Limits
.*
## Versions
.*transformers \d.*
<!-- aselect:versions:end -->
"""


@pytest.fixture
def selected(make_model, normal):
    """A model with three channels, and the selection that was applied to it."""
    model = make_model(num_channels=3)
    selection = select_timestep(
        model, normal(4, 3, 8, 8).clamp(-1, 1), method="hfr", timesteps=[0, 100, 800], progress=False
    )
    return selection.apply(model), selection


@pytest.fixture
def folder(selected, tmp_path) -> Path:
    save_model(selected[0], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def audit(selected, normal) -> Audit:
    model, selection = selected
    return audit_timestep(model, normal(4, 3, 8, 8).clamp(-1, 1), selection=selection, progress=False)


@pytest.fixture
def card(folder, selected, audit) -> ModelCard:
    return prepare_upload(
        folder, "ada/dit", selection=selected[1], results=[RESULT], training=TRAINING, audit=audit
    ).card


@pytest.fixture
def content(make_config):
    def build(architecture="ASelectDiTModel", **fields) -> CardContent:
        known = {name: fields.pop(name) for name in list(fields) if name in ("results", "license", "training")}
        return CardContent(make_config(**fields), "ada/dit", architecture, 1_000_000, **known)

    return build


@pytest.fixture
def comparison(selected) -> Comparison:
    selection = selected[1]
    rows = [
        ComparisonRow("hfr", selection, 0.8, [0.7, 0.8]),
        ComparisonRow("fixed", replace(selection, timestep=5), 0, [0]),
    ]
    return Comparison(rows, [0.5], {"images": "6 train", "probe": "linear", "seeds": 2})


# -- text --


def test_whole_card(card):
    assert re.fullmatch(PATTERN, str(card), re.DOTALL)
    assert [line[3:] for line in card.text.splitlines() if line.startswith("## ")] == list(SECTIONS)
    assert "/home" not in str(card)


@pytest.mark.parametrize(
    ("architecture", "fields", "present"),
    [
        ("ASelectDiTModel", {"timestep": None, "num_channels": 3}, "not selected: a tenth of the schedule"),
        ("ASelectDiTModel", {"noise_schedule": {"type": "flow_matching"}}, "`sigma = t / 1000`"),
        ("ASelectDiTModel", {"num_channels": 2}, "torch.zeros(1, 2, 8, 8)"),
        ("ASelectDiTModel", {"num_noise_draws": 3}, "averaged over 3 draws"),
        ("ASelectDiTModel", {"base_model": "ada/base"}, "with weights from [ada/base]"),
        ("ASelectDiTForImageClassification", {"num_channels": 3}, "AutoModelForImageClassification"),
        ("ASelectDiTForSemanticSegmentation", {"num_channels": 3}, 'pipeline("image-segmentation"'),
    ],
)
def test_card_of_any_model_says_nothing_empty(content, architecture, fields, present):
    text = render_card(content(architecture, **fields)).text
    assert present in text
    assert not re.search(r"\bNone\b|\bnan\b|\{\{|\{%", text)
    assert not re.search(r"## [^\n]+\n\s*(##|<!-- aselect:\w+:end)", text), "an empty section"
    assert "Results" not in text
    assert "## Training" not in text


def test_a_head_names_its_classes_and_everything_it_reads(make_config):
    config = make_config(num_channels=3, num_labels=2, id2label={0: "cat", 1: "dog"})
    config.head_features, config.head_timesteps = ["blocks.0.key", "blocks.2.hidden"], [20, 60]
    text = render_card(CardContent(config, "ada/dit", "ASelectDiTForImageClassification", 1)).text
    assert "at timesteps t = 20, 60; one forward pass for each runs up to block 2" in text
    assert "`blocks.0.key`, `blocks.2.hidden` are the features" in text
    assert "| classes | cat, dog |" in text


@pytest.mark.parametrize("again", [False, True])
def test_a_fixed_timestep_is_named(selected, make_model, tmp_path, again):
    """With the selection that chose it, or without one where something else was fixed."""
    model, selection = selected
    fixed = model.fix_timestep(selection.timestep + 7 if again else None, class_label=3)
    save_model(fixed, tmp_path / "fixed")
    upload = prepare_upload(tmp_path / "fixed", "ada/dit", selection=None if again else selection)
    text = upload.card.text
    assert f"t = {fixed.config.timestep} of 0..999 ({'given' if again else 'chosen by `hfr`'})" in text
    assert "| fixed | timestep, noise and class 3 are folded into the weights, which leaves a plain ViT" in text
    assert "| noise draw | seed 0, part of the position embedding |" in text
    assert "the first 2 of 3 blocks" in text
    assert "on the checkpoint this one was made from" in text
    assert "interpolated" not in text
    parameters = count_parameters(tmp_path / "fixed", ())
    assert parameters == fixed.num_parameters()
    assert f"{parameters / 1e6:,.1f} M parameters in total" in text
    assert upload.sizes()["model.safetensors"] < 4 * parameters + 5000
    assert {"fixed_timestep.py", "blocks.py"} <= upload.files.keys()


def test_code_in_the_card_is_python(card, content):
    for text in (card.text, render_card(content(num_channels=2)).text):
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert blocks
        for block in blocks:
            compile(block, "card", "exec")


# -- names from elsewhere --

NASTY = [
    "a|b", "line\nbreak", "\r\n\r\n# Heading", "`code`", "``", "<b>bold</b>", "<script>", "[link](ftp://evil.org)",
    "![x](y)", "<!-- aselect:results:end -->", "<!-- aselect:summary:begin -->", "---", "***", "| - | - |", "\\", "\\|",
    "_a_", "a_", "~~a~~", "$x$", "&amp;", "&lt;", "{{ name }}", "{% if %}", ": yaml", "- item", "1. one", "@ada", "'",
    '"', "\x00", "\u2028", "#hash",
]  # fmt: skip
names = (
    st.one_of(
        st.sampled_from(NASTY),
        st.lists(st.sampled_from(NASTY), min_size=2, max_size=3).map("".join),
        st.text(min_size=1),
    )
    .filter(
        lambda name: shown(name) and shown(f"({name})") == f"({shown(name)})"  # no spaces or the like around it
    )
    .filter(lambda name: publishable(f"x={name} {name}") == f"x={name} {name}")
)


def shown(text: object) -> str:
    """A text as a page shows it: line breaks and runs of spaces are one space."""
    return " ".join("".join(" " if ord(c) < 32 or 127 <= ord(c) < 160 else c for c in str(text)).split())


def page(text: str) -> tuple[list[str], list[str], int]:
    """Headings, table cells and number of raw HTML blocks of a page, as a reader of Markdown sees them."""
    headings, cells, tokens = [], [], MarkdownIt().enable(["table", "strikethrough"]).parse(text)
    for before, token in itertools.pairwise(tokens):
        if token.type == "inline":
            kinds = ("text", "text_special", "code_inline")
            content = shown("".join(child.content for child in token.children or () if child.type in kinds))
            if before.type == "heading_open":
                headings.append(content)
            elif before.type in ("td_open", "th_open"):
                cells.append(content)
    return headings, cells, sum(token.type == "html_block" for token in tokens)


@pytest.fixture(scope="module")
def card_of_names(make_config):
    """`card_of_names(name)`: a card in which everything that people name has this name."""

    def build(name: str) -> ModelCard:
        result = EvaluationResult(f"{name} of ours", name, 0.5, protocol=name, split=name, label=name)
        selection = TimestepSelection(
            method=name, feature="blocks.1.query", timestep=100, timesteps=[100], scores=[1.0], standard_errors=[0.0],
            cost=SelectionCost(0, 0.0, 0.0), schedule=make_config().noise_schedule, score_name=name,
            options={name: name},
        )  # fmt: skip
        config = make_config(num_channels=3, id2label={0: name, 1: "b"}, timestep=100, feature="blocks.1.query")
        comparison = Comparison([ComparisonRow(name, selection, 0.8, [0.7])], [0.5], {"images": name})
        training = {"arguments": {"dataset_name": name, name: "x"}, "steps": 3}
        architecture = "ASelectDiTForImageClassification"
        content = CardContent(
            config, "ada/dit", architecture, 1, selection, [result], comparison, "ada/flowers", training
        )
        return render_card(content)

    return build


@settings(max_examples=25)
@given(name=names)
def test_any_name_survives_a_card(card_of_names, name):
    """It shows as it is, makes no heading, table or HTML, and later pushes find every part again."""
    card, plain = card_of_names(name), card_of_names("plain")
    (headings, cells, blocks), (plain_headings, plain_cells, plain_blocks) = page(card.text), page(plain.text)
    assert (headings, blocks) == (plain_headings, plain_blocks)
    expected = [shown(cell.replace("plain", name)) for cell in plain_cells]
    assert cells == expected
    read = ModelCard(str(card))
    assert read.text.strip() == card.text.strip()
    assert str(merge_cards(card, read)) == str(card)
    assert str(merge_cards(plain, read)) == str(plain)


def test_a_comparison_of_any_name_is_one_table(comparison):
    comparison.rows[0].strategy = "a|b\n# c"
    comparison.protocol["images"] = "<!-- aselect:results:end -->\n# d"
    headings, cells, blocks = page(comparison.markdown())
    assert (headings, blocks) == ([], 0)
    assert "a|b # c" in cells


# -- metadata --


def test_metadata(card):
    data = ModelCard(str(card)).data.to_dict()
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert data["datasets"] == ["ada/flowers"]
    assert data["metrics"] == ["mean_iou"]
    assert all(entry["src"].startswith("https://") and entry["example_title"] for entry in data["widget"])
    assert "license" not in data
    name, [result] = model_index_to_eval_results(data["model-index"])
    assert (name, result.dataset_split, result.metric_type, result.metric_value) == ("dit", "val", "mean_iou", 0.5)


def test_license_and_base_model(content):
    data = render_card(content(base_model="facebook/DiT-XL-2-256", base_model_license="cc-by-nc-4.0")).data.to_dict()
    assert data["license"] == "cc-by-nc-4.0"
    assert (data["base_model"], data["base_model_relation"]) == ("facebook/DiT-XL-2-256", "finetune")
    with pytest.raises(ValueError, match="license 'mit' is refused: the base model's 'cc-by-nc"):
        content(base_model_license="cc-by-nc-4.0", license="mit")
    with pytest.raises(ValueError, match=r"config\.base_model must be the id"):
        content(base_model="/home/ada/dit")


@pytest.mark.parametrize(
    ("base", "claimed", "expected"),
    [
        (None, "mit", "mit"),
        ("mit", None, "mit"),
        ("mit", "apache-2.0", "apache-2.0"),
        ("MIT", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
        ("openrail", "openrail", "openrail"),
        ("cc-by-nc-4.0", "cc-by-4.0", None),
        ("cc-by-nc-4.0", "apache-2.0", None),
        ("apache-2.0", "cc0-1.0", None),
        ("gpl-3.0", "mit", None),
        ("cc-by-sa-4.0", "cc-by-nc-sa-4.0", None),
        ("openrail", "mit", None),
        ("mit", "something", None),
    ],
)
def test_licenses_never_get_freer(base, claimed, expected):
    if expected is None:
        with pytest.raises(ValueError, match="omit it to inherit the latter"):
            inherited_license(base, claimed)
    else:
        assert inherited_license(base, claimed) == expected


# -- results --


def test_results_are_in_the_metadata_and_for_a_benchmark_in_a_file_too(folder, comparison, selected):
    upload = prepare_upload(folder, "ada/dit", selection=selected[1], results=comparison, dataset="ada/flowers")
    assert not [name for name in upload.files if name.startswith(".eval_results")]
    assert "Comparison of selection rules" in upload.card.text
    assert "accuracy of a probe on the frozen feature | 0.7500 ± 0.0707" in upload.card.text
    [result] = upload.card.data.eval_results
    assert result.metric_value == 0.75
    figure = replace(RESULT, benchmark_task="flowers_102")
    upload = prepare_upload(folder, "ada/dit", selection=selected[1], results=[RESULT, figure])
    [entry] = parse_eval_result_entries(yaml.safe_load(upload.files[".eval_results/aselect-ada-flowers.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("ada/flowers", "flowers_102", 0.5)
    assert RESULT.protocol in entry.notes
    assert len(upload.card.data.eval_results) == 2


def test_comparison_at_another_timestep_is_no_result_of_this_model(folder, comparison):
    comparison.rows = comparison.rows[1:]
    upload = prepare_upload(folder, "ada/dit", results=comparison, dataset="ada/flowers")
    assert "Comparison of selection rules" in upload.card.text
    assert upload.card.data.eval_results is None


def test_comparison_is_read_back(comparison, tmp_path):
    comparison.save(tmp_path)
    assert Comparison.load(tmp_path / "compare.json") == comparison
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(ValueError, match="not a saved comparison"):
        Comparison.load(tmp_path / "compare.json")


def test_every_figure_needs_a_protocol():
    with pytest.raises(ValueError, match="protocol of the mean_iou on ada/flowers is empty"):
        replace(RESULT, protocol=" ")
    with pytest.raises(ValueError, match="must be a number"):
        replace(RESULT, value="0.5")


@pytest.mark.parametrize("dataset", ["../../x", "my own pictures", "/data/x", "a/b/c", "sample"])
def test_unpublished_data_sets_stay_out_of_files_and_metadata(content, dataset):
    result = replace(RESULT, dataset=dataset)
    assert not is_hub_id(dataset)
    assert eval_result_files([result]) == {}
    card = render_card(content(results=[result]))
    assert ("x (a local folder)" if dataset == "/data/x" else dataset) in card.text
    assert card.data.eval_results is None
    assert card.data.datasets is None


# -- hand edits --


def test_words_around_generated_parts_survive(card, content):
    parts = re.split(r"(?<=:end -->)", card.text)
    edited = ModelCard(
        "---\nlanguage: en\nlicense: mit\ntags: [mine]\n---\nBefore all.\n"
        + "".join(f"{part}\nWords {index}.\n" for index, part in enumerate(parts))
    )
    new = render_card(content(num_channels=3))
    merged = merge_cards(new, edited)
    for words in ["Before all.", *(f"Words {index}." for index in range(len(parts)))]:
        assert merged.text.count(words) == 1
    assert "## Results" not in merged.text
    assert "`blocks.1.query`" in merged.text
    assert str(merge_cards(new, merged)) == str(merged)
    data = merged.data.to_dict()
    assert (data["language"], data["license"]) == ("en", "mit")
    assert set(data["tags"]) > {"mine", "aselect_dit"}
    assert "model-index" not in data
    restored = merge_cards(card, merged)
    assert [line[3:] for line in restored.text.splitlines() if line.startswith("## ")] == list(SECTIONS)
    assert str(merge_cards(card, card)) == str(card)


def test_a_foreign_card_is_kept_below(card):
    merged = merge_cards(card, ModelCard("# My model\r\n\r\nWritten by hand.\r\n"))
    assert merged.text.strip().endswith("# My model\n\nWritten by hand.")
    assert merged.text.index("## Versions") < merged.text.index("# My model")


def test_a_lost_marker_is_named(card):
    broken = ModelCard(str(card).replace("<!-- aselect:results:end -->", ""))
    message = "<!-- aselect:results:begin --> has no matching marker; restore that one, or remove this one"
    with pytest.raises(ValueError, match=message):
        merge_cards(card, broken)


# -- what goes along --


def test_files(folder, selected):
    for name in ("adapter_model.safetensors", "optimizer.npz", "notes.txt"):
        (folder / name).write_bytes(b"private")
    (folder / "checkpoint-10").mkdir()
    selected[1].save(folder / "selection.json")
    (folder / "training.json").write_text(json.dumps(TRAINING))
    upload = prepare_folder(folder, "ada/dit", dataset=None, license=None)
    assert set(upload.files) >= {
        "config.json", "handler.py", "model.safetensors", "notebook.ipynb", "preprocessor_config.json",
        "selection.json", "selection.png", "training.json",
    }  # fmt: skip
    assert not {"adapter_model.safetensors", "optimizer.npz", "notes.txt", "checkpoint-10"} & set(upload.files)
    assert json.loads(upload.files["selection.json"])["model"] == "ada/dit"
    assert "output_dir" not in upload.files["training.json"].decode()


def test_an_applied_selection_is_remembered_by_the_config(folder):
    upload = prepare_folder(folder, "ada/dit", dataset=None, license=None)
    assert upload.files["selection.png"].startswith(b"\x89PNG")
    assert "selection.json" not in upload.files
    assert "forward passes" not in upload.card.text, "the config does not know the cost"


def test_the_gate_is_explained(folder, selected):
    gate = replace(selected[1], method="gate", options={"num_visited_timesteps": 2}, score_name="gate weight")
    text = prepare_upload(folder, "ada/dit", selection=gate).card.text
    assert RULES["gate"].explanation in text
    assert "`gate` with `num_visited_timesteps=2`" in text
    assert "| candidates | 3 timesteps" in text
    assert "The timestep was given" not in text


def test_few_labels_are_named(folder, selected):
    logme = replace(selected[1], method="logme", score_name="LogME")
    text = prepare_upload(folder, "ada/dit", selection=logme).card.text
    assert RULES["logme"].explanation in text
    assert "A few labels were used." in text
    assert "LogME at t =" in text


def test_an_audit_goes_along(folder, audit, tmp_path):
    audit.picked.model = "/home/ada/dit"
    audit.save(folder / "audit.json")
    upload = prepare_folder(folder, "ada/dit", dataset=None, license=None)
    assert upload.files["audit.png"].startswith(b"\x89PNG")
    sent = json.loads(upload.files["audit.json"])
    assert {each["model"] for each in sent["selections"].values()} == {"ada/dit"}
    assert (sent["sentence"], sent["verdict"]) == (audit.sentence, audit.verdict)
    other = replace(audit, sentence="somebody else's words")
    assert ": somebody else's words." in prepare_folder(
        folder, "ada/dit", dataset=None, license=None, audit=other
    ).card.text  # fmt: skip
    (folder / "audit.json").unlink()
    without = prepare_folder(folder, "ada/dit", dataset=None, license=None)
    assert "be trusted?" not in without.card.text
    assert not {"audit.json", "audit.png"} & set(without.files)


def test_an_audit_with_labels_tells_points(folder, audit):
    regret = Regret(best_timestep=100, estimate=1.25, lower=0.5, upper=3.0, differs=True)
    text = prepare_upload(folder, "ada/dit", audit=replace(audit, regret=regret, tolerance=2.0)).card.text
    assert "| lost against the best of 3 timesteps | 1.2 points, between 0.5 and 3.0 (95 % each) |" in text
    assert "| accepted loss | 2 points |" in text


def test_an_audit_must_be_of_the_timestep(folder, audit):
    moved = {name: replace(each, timestep=7) for name, each in audit.selections.items()}
    with pytest.raises(ValueError, match=r"audit is of t = 7 of .*, but the config has t = "):
        prepare_upload(folder, "ada/dit", audit=replace(audit, selections=moved))


def test_a_selection_must_be_applied(folder, selected):
    with pytest.raises(ValueError, match=r"call selection\.apply\(model\) first"):
        prepare_upload(folder, "ada/dit", selection=replace(selected[1], timestep=7))


def test_no_handler_without_images(make_model, tmp_path):
    save_model(make_model(num_channels=2), tmp_path)
    upload = prepare_upload(tmp_path, "ada/dit")
    assert "handler.py" not in upload.files
    assert "handler" not in upload.card.text


def test_secrets_and_paths_leave_training_records():
    arguments = {"hub_token": "hf_x", "train_dir": "/a/b", "model_name_or_path": "/home/ada/dit", "seed": 1}
    cleaned = publishable_training({"arguments": arguments, "steps": 1})
    assert cleaned == {"arguments": {"model_name_or_path": "dit", "seed": 1}, "steps": 1}


def test_nothing_that_is_pushed_holds_a_secret_or_a_local_path(folder, selected, audit, comparison):
    told = "https://user:s3cr3tWord@host.org/x, hf_s3cr3tWord, HF_TOKEN=s3cr3tWord of /home/ada/pictures"
    upload = prepare_upload(
        folder,
        "ada/dit",
        selection=replace(selected[1], model=told, options={"note": told}),
        results=[replace(RESULT, dataset=told, protocol=told), replace(RESULT, dataset="/home/ada/flowers")],
        comparison=replace(comparison, protocol={"images": told}),
        training=TRAINING | {"arguments": {"dataset_name": told, "note": [told], "hub_token": "s3cr3tWord"}},
        audit=replace(audit, warnings=[told]),
    )
    for name, content in (upload.files | {"README.md": str(upload.card).encode()}).items():
        text = content.read_bytes() if isinstance(content, Path) else content
        assert b"s3cr3tWord" not in text, name
        assert b"/home/ada" not in text, name
    assert "| flowers (a local folder) |" in upload.card.text
    assert upload.card.data.datasets is None


def test_a_token_in_a_config_is_refused(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "hf_s3cr3tWord"}))
    with pytest.raises(ValueError, match=r"config\.json holds what looks like a secret in token: remove it"):
        prepare_upload(folder, "ada/dit")


@pytest.fixture
def with_examples(folder) -> Path:
    """The folder of a model with one example of a training beside it."""
    for name in ("widget-1.png", "widget-1-output.png", "widget-2.png"):
        (folder / name).write_bytes(b"picture")
    example = {"src": "widget-1.png", "example_title": "Example 1", "output": {"url": "widget-1-output.png"}}
    (folder / "widget.json").write_text(json.dumps({"dataset": "ada/flowers", "examples": [example]}))
    return folder


def test_examples_go_along_with_their_answers_where_asked_for(with_examples):
    upload = prepare_folder(with_examples, "ada/dit", dataset=None, license=None)
    assert upload.card.data.to_dict()["widget"] == json.loads((with_examples / "widget.json").read_text())["examples"]
    assert {name for name in upload.files if name.startswith("widget")} == {"widget-1.png", "widget-1-output.png"}
    without = prepare_folder(with_examples, "ada/dit", dataset=None, license=None, examples=False)
    assert not [name for name in without.files if name.startswith("widget")]
    mine = [{"src": "mine.png", "example_title": "Mine"}]
    for present, expected in ((upload, without), (without, without), (replace_widget(upload, mine), mine)):
        merged = merge_cards(without.card, present.card if hasattr(present, "card") else present).data.to_dict()
        assert merged["widget"] == (expected if expected is mine else without.card.data.to_dict()["widget"])


def replace_widget(upload, widget) -> ModelCard:
    card = ModelCard(str(upload.card))
    card.data.widget = widget
    return card


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "config.json", "widget-9.png", "widget-/../x.png"])
def test_examples_are_pictures_beside_the_model_and_nothing_else(with_examples, name):
    path = with_examples / "widget.json"
    path.write_text(path.read_text().replace("widget-1.png", name))
    with pytest.raises(
        ValueError, match=r"widget\.json does not hold the examples of a training \(.* is not a picture"
    ):
        prepare_folder(with_examples, "ada/dit", dataset=None, license=None)


@pytest.mark.parametrize(
    ("license", "state", "shared"),
    [
        ("mit", {}, True), ("cc-by-nc-4.0", {}, True), ("cc-by-nd-4.0", {}, False), ("unknown", {}, False),
        (None, {}, False), ("mit", {"private": True}, False), ("mit", {"gated": "manual"}, False),
    ],
)  # fmt: skip
def test_pictures_are_shared_by_the_license_of_their_data_set(license, state, shared, caplog):
    class Api:
        def dataset_info(self, name):
            facts = {"private": False, "gated": False} | state
            return SimpleNamespace(card_data={"license": license}, **facts)

    assert may_share("ada/flowers", Api()) == shared
    assert may_share("sample", Api())
    assert ("example pictures are not pushed" in caplog.text) != shared


def test_pictures_of_a_folder_are_not_shared():
    assert not may_share("flowers (a local folder)", HfApi())


# -- what is refused --


WRONG_TYPES = [
    ("training.json", {"history": "none"}, "history: should be a valid array, got 'none'"),
    ("training.json", {"history": [{"loss": "low"}]}, "history.0.loss: should be a valid number, got 'low'"),
    ("training.json", {"arguments": ["a"]}, r"arguments: should be an object, got ['a']"),
    ("training.json", {"seconds": None}, "seconds: should be a valid number, got None"),
    ("results.json", {"results": {"accuracy": 1}}, "results: should be a valid array"),
    ("results.json", {"results": [asdict(RESULT) | {"value": "0.5"}]}, "results.0.value: should be a valid number"),
    ("results.json", {"results": [{"dataset": "a"}]}, "field results.0.metric is missing"),
    ("results.json", {"results": [asdict(RESULT) | {"protocol": ""}]}, "is empty: say how it was measured"),
    ("selection.json", {"timestep": "100"}, "timestep: should be a valid integer, got '100'"),
    ("selection.json", {"scores": [1.0, "2"]}, "scores.1: should be a valid number, got '2'"),
    ("selection.json", {"cost": 3}, "cost: should be an object, got 3"),
    ("selection.json", {"options": []}, "options: should be an object, got []"),
    ("audit.json", {"warnings": "none"}, "warnings: should be a valid array, got 'none'"),
    ("audit.json", {"selections": []}, "selections: should be an object, got []"),
    ("compare.json", {"rows": [1]}, "rows.0: should be an object, got 1"),
    ("compare.json", {"protocol": "none"}, "protocol: should be an object, got 'none'"),
    ("config.json", {"id2label": ["a", "b"]}, "id2label: should be an object, got ['a', 'b']"),
    ("config.json", {"architectures": "DiT"}, "architectures: should be a valid array, got 'DiT'"),
]


def test_a_wrong_type_is_named_with_file_and_field(folder, selected, audit, comparison):
    """In every JSON that a push reads back, in one line."""
    selected[1].save(folder / "selection.json")
    audit.save(folder / "audit.json")
    comparison.save(folder / "comparison")
    (folder / "comparison" / "compare.json").rename(folder / "compare.json")
    (folder / "training.json").write_text(json.dumps(TRAINING))
    (folder / "results.json").write_text(json.dumps({"results": [asdict(RESULT)]}))
    assert prepare_folder(folder, "ada/dit", dataset=None, license=None).files
    for file, fields, message in WRONG_TYPES:
        right = (folder / file).read_text()
        content = json.loads(right)
        for name, value in fields.items():
            content[name] = content[name] | value if name == "selection" else value
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            prepare_folder(folder, "ada/dit", dataset=None, license=None)
        assert "\n" not in str(error.value)
        assert file in str(error.value)
        (folder / file).write_text(right)


def test_a_wrong_type_in_a_remembered_selection_is_named(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["selection"]["scores"] = "high"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.selection: scores: should be a valid array, got 'high'"):
        prepare_folder(folder, "ada/dit", dataset=None, license=None)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ema.pt", "state.pkl"])
def test_pickles_are_never_pushed(folder, name):
    (folder / name).write_bytes(b"\x80")
    with pytest.raises(ValueError, match=f"pickles, which are never pushed: remove {name}"):
        prepare_upload(folder, "ada/dit")


def test_missing_and_damaged_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"weights .*model\.safetensors cannot be read"):
        prepare_upload(folder, "ada/dit")
    weights.unlink()
    with pytest.raises(ValueError, match=r"holds no weights"):
        prepare_upload(folder, "ada/dit")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "24"}, "hidden_size"),
        ({"hidden_size": 10**12}, "hidden_size must be an integer in 1..65536"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be"),
        ({"feature": "../../etc/passwd"}, "feature '../../etc/passwd'"),
        ({"feature": ["blocks.1.query"]}, "feature"),
        ({"timestep": 10**9}, "timestep must be an integer in 0..999"),
        ({"noise_schedule": {"type": "ddpm", "path": "/etc"}}, "noise_schedule has unknown fields"),
        ({"noise_schedule": "linear"}, "noise_schedule"),
        ({"vae_config": {"_class_name": "os.system"}}, "vae_config must describe an AutoencoderKL"),
        ({"selection": {"method": "hfr"}}, "config.selection has no field"),
        ({"base_model": "../../x"}, "config.base_model must be the id"),
    ],
)
def test_a_malicious_config_is_named(folder, fields, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_upload(folder, "ada/dit")
