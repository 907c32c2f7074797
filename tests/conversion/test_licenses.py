"""Licenses as people write them: read, named as the Hub names them, and carried on with name, link and text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aselect_hf import ASelectDiTConfig, ASelectDiTForImageClassification, ASelectDiTModel
from aselect_hf.conversion import convert_checkpoint, load_checkpoint, load_model, locate, save_model
from aselect_hf.conversion.licenses import COPYLEFT, PERMISSIVE, PUBLIC_DOMAIN, normalize_license
from aselect_hf.hub import push_to_hub
from aselect_hf.hub.licenses import check_base_license, inherited_license, special_terms
from aselect_hf.hub.upload import prepare_folder
from aselect_hf.training.arguments import DataArguments, PretrainingArguments, PretrainModelArguments
from aselect_hf.training.parsing import parse_arguments
from aselect_hf.training.pretrain import pretrain

KNOWN = (*PUBLIC_DOMAIN, *PERMISSIVE, *COPYLEFT, "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Apache 2.0", "apache-2.0"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("apache2.0", "apache-2.0"),
        ("The MIT License (MIT)", "mit"),
        ("GPLv3", "gpl-3.0"),
        ("AGPL-3.0-or-later", "agpl-3.0"),
        ("CC BY-NC 4.0", "cc-by-nc-4.0"),
        ("Creative Commons Attribution-NonCommercial 4.0 International", "cc-by-nc-4.0"),
        ("BSD 3-Clause", "bsd-3-clause"),
        ("CreativeML OpenRAIL-M", "creativeml-openrail-m"),
        ("deepfloyd-if-license", "deepfloyd-if-license"),
        (["MIT"], "mit"),
        (["MIT", "Apache 2.0", "mit"], ["mit", "apache-2.0"]),
        ("", None),
        (None, None),
        (False, None),
        ({"id": "mit"}, None),
        ([], None),
    ],
    ids=str,
)
def test_identifiers_are_those_of_the_hub(written: Any, expected: Any) -> None:
    assert normalize_license(written) == expected


@given(st.sampled_from(KNOWN), st.sampled_from([str.upper, str.title, str.lower]), st.sampled_from(["-", " ", "_"]))
def test_case_and_spaces_do_not_matter(name: str, case: Any, between: str) -> None:
    assert normalize_license(case(name).replace("-", between)) == name


def test_several_licenses_ask_for_what_any_of_them_asks() -> None:
    both = ["mit", "cc-by-nc-4.0"]
    assert inherited_license(both, None) == both
    assert inherited_license(both, "CC BY-NC 4.0") == "cc-by-nc-4.0"
    with pytest.raises(ValueError, match="is more restrictive"):
        inherited_license(both, "apache-2.0")
    with pytest.raises(ValueError, match="cannot be compared"):
        inherited_license(["mit", "openrail"], "mit")


CARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "a list": ("license: [mit, Apache 2.0]", {"license": ["mit", "apache-2.0"]}),
    "another spelling": ("license: Apache 2.0", {"license": "apache-2.0"}),
    "another license": (
        "license: other\nlicense_name: my-license\nlicense_link: LICENSE.md",
        {"license": "other", "license_name": "my-license", "license_link": "LICENSE.md"},
    ),
    "an incomplete model-index": (
        "license: mit\nmodel-index: [{name: x, results: [{task: {type: a}}]}]",
        {"license": "mit"},
    ),
    "broken": ("license: [mit", {}),
    "no mapping": ("- mit", {}),
    "nothing": ("", {}),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_license_travels_from_the_base_model_to_the_card(
    pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Through conversion, what is pushed, and the card; a card that cannot be read is said."""
    written, expected = CARDS[name]
    (pipeline_folder / "README.md").write_text(f"---\n{written}\n---\n# A DiT\n" if written else "only text")
    (pipeline_folder / "LICENSE.md").write_text("Be kind.")
    with caplog.at_level(logging.WARNING):
        convert_checkpoint(pipeline_folder, tmp_path / "ours")
    assert ("license is unknown" in caplog.text) is (name in ("broken", "no mapping"))
    assert (tmp_path / "ours" / "LICENSE.md").read_text() == "Be kind."
    upload = prepare_folder(tmp_path / "ours", "ada/dit", dataset=None, license=None)
    metadata = yaml.safe_load(str(upload.card).split("---")[1])
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == expected
    assert "LICENSE.md" in upload.files
    for value in expected.values():
        assert all(text in upload.card.text for text in ([value] if isinstance(value, str) else value))


def test_a_link_into_a_repository_becomes_an_address(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file does not lie beside a model that was never on this disk."""
    card = "---\nlicense: other\nlicense_name: mine\nlicense_link: ./LICENSE\n---\n"
    (pipeline_folder / "README.md").write_text(card)
    monkeypatch.setattr(locate, "snapshot_download", lambda *_, **__: str(pipeline_folder))
    config = ASelectDiTModel.from_diffusers("ada/dit").config
    assert config.base_model_license_link == "https://huggingface.co/ada/dit/blob/main/LICENSE"


def test_a_link_to_a_file_that_is_not_there_is_left_out(pipeline_folder: Path, tmp_path: Path) -> None:
    (pipeline_folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n")
    load_checkpoint(pipeline_folder).save_pretrained(tmp_path / "ours")
    upload = prepare_folder(tmp_path / "ours", "ada/dit", dataset=None, license=None)
    metadata = yaml.safe_load(str(upload.card).split("---")[1])
    assert metadata["license_name"] == "mine"
    assert "license_link" not in metadata


FLUX = {
    "base_model": "black-forest-labs/FLUX.1-dev",
    "base_model_license": "other",
    "base_model_license_name": "flux-1-dev-non-commercial-license",
    "base_model_license_link": "LICENSE.md",
}
TERMS: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"base_model_license": "apache-2.0"}, ""),
    ({"base_model_license": "cc-by-sa-4.0"}, ""),
    ({"base_model_license": ["mit", "apache-2.0"]}, ""),
    ({"base_model_license": "CC BY-NC 4.0"}, "license cc-by-nc-4.0. It does not permit commercial use."),
    ({"base_model_license": ["mit", "cc-by-nc-4.0"]}, "license mit, cc-by-nc-4.0. It does not permit commercial"),
    ({"base_model_license": "cc-by-nd-4.0"}, "does not permit to share changed versions"),
    ({"base_model_license": "openrail++"}, "license openrail++. It has conditions of its own."),
    (
        FLUX,
        "derive from black-forest-labs/FLUX.1-dev under the license other, flux-1-dev-non-commercial-license",
    ),
    ({"base_model_license": "apache-2.0", "base_model_gated": True}, "apache-2.0. The base model is gated"),
    ({"base_model_gated": True}, "no stated license. The base model is gated"),
]


@pytest.mark.parametrize(("fields", "message"), TERMS, ids=str)
def test_special_terms_have_to_be_accepted(fields: dict[str, Any], message: str) -> None:
    config = ASelectDiTConfig(**fields)
    assert bool(special_terms(config)) is bool(message)
    check_base_license(config, accepted=True)
    if not message:
        check_base_license(config, accepted=False)
        return
    with pytest.raises(ValueError) as raised:
        check_base_license(config, accepted=False)
    assert message in str(raised.value)
    assert "--accept-base-license" in str(raised.value)


def test_the_hub_is_not_even_asked_without_acceptance(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aselect_hf.hub.push.PushTarget", None)
    with pytest.raises(ValueError, match="pass accept_base_license=True"):
        push_to_hub(make_model(base_model_license="other"), "ada/dit")


GATED = """---
license: other
license_name: community
license_link: https://example.org/license
extra_gated_prompt: Be kind.
---
"""


def test_license_and_notice_go_from_model_to_model(pipeline_folder: Path, tmp_path: Path) -> None:
    """Read in Python, saved, read with a head, saved again, and pushed; the card has the terms."""
    (pipeline_folder / "README.md").write_text(GATED)
    (pipeline_folder / "LICENSE.md").write_text("Be kind.")
    (pipeline_folder / "NOTICE").write_text("From us.")
    ASelectDiTModel.from_diffusers(pipeline_folder).save_pretrained(tmp_path / "first")
    head = load_model(tmp_path / "first", ASelectDiTForImageClassification, new_head=True, num_labels=2)
    assert head.config.base_model_gated
    save_model(head, tmp_path / "second")
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert (folder / "LICENSE.md").read_text() == "Be kind."
        assert (folder / "NOTICE").read_text() == "From us."
    upload = prepare_folder(tmp_path / "second", "ada/dit", dataset=None, license=None)
    assert {"LICENSE.md", "NOTICE"} <= upload.files.keys()
    text = (
        "The weights derive under the license other, community (https://example.org/license). It has conditions of its "
        "own. The base model is gated: its terms have to be accepted on its page. These terms hold for this model, too"
    )
    assert text in upload.card.text
    metadata = yaml.safe_load(str(upload.card).split("---")[1])
    assert (metadata["license_name"], metadata["license_link"]) == ("community", "https://example.org/license")


def test_a_free_license_needs_no_words(pipeline_folder: Path, tmp_path: Path) -> None:
    (pipeline_folder / "README.md").write_text("---\nlicense: mit\n---\n")
    convert_checkpoint(pipeline_folder, tmp_path / "ours")
    card = prepare_folder(tmp_path / "ours", "ada/dit", dataset=None, license=None).card
    assert "License of the base model" not in card.text


def test_a_training_that_may_not_push_does_not_start(make_model: Any, tmp_path: Path) -> None:
    make_model(num_channels=3, num_condition_classes=0, base_model_license="cc-by-nc-4.0").save_pretrained(
        tmp_path / "model"
    )
    arguments = {
        "model_name_or_path": str(tmp_path / "model"), "dataset_name": "sample", "max_train_samples": "10",
        "output_dir": str(tmp_path / "out"), "push_to_hub": "true",
    }  # fmt: skip
    command = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    parsed = parse_arguments((PretrainModelArguments, DataArguments, PretrainingArguments), "", command)
    with pytest.raises(ValueError, match="--accept-base-license"):
        pretrain(*parsed)
    assert not list((tmp_path / "out").iterdir())
