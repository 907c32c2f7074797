"""Secrets and local paths: what is taken out of arguments and records, and what is left as it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aselect_hf.hub.redaction import publishable, without_secrets

SECRET = "s3cr3tWord"
WITH_SECRET = [
    f"https://user:{SECRET}@host.org/data.parquet",
    f"https://{SECRET}@host.org/data.parquet",
    f"https://user:{SECRET}@@host.org/a/b",
    f"zip://*.png::https://user:{SECRET}@host.org/a.zip",
    f"s3 at https://bucket.s3.amazonaws.com/a.tar?X-Amz-Credential=A&X-Amz-Signature={SECRET}",
    f"https://account.blob.core.windows.net/c/a.tar?sv=1&sig={SECRET}",
    f"https://host.org/a#access={SECRET}",
    f"train.py --hub_token {SECRET} --seed 1",
    f"train.py --hub_token={SECRET}",
    f"HF_TOKEN={SECRET} accelerate launch train.py",
    f"wandb_api_key={SECRET}",
    f"password = {SECRET}",
    f"Authorization: Bearer {SECRET}",
    f"hf_{SECRET}",
    f"cloned with hf_{SECRET}.",
]
HARMLESS = [
    "ada/flowers", "runs/classify", "https://huggingface.co/datasets/ada/flowers", "cycles per token 0.15", "/", "\\",
    "num_tokens=16", "pip install hf_transfer", "a@b", "12 images/s, 1/2 of them", "blocks.1.query at t = 100",
]  # fmt: skip
LOCAL = [
    "/home/ada/pictures", "/home/ada/pictures/", "~/pictures", "~ada/x/pictures", "C:\\Users\\ada\\pictures",
    "file:///home/ada/pictures", "/home/ada/my own/pictures",
]  # fmt: skip


@dataclass(frozen=True)
class Part:
    text: str
    more: tuple[str, ...] = ()


@pytest.mark.parametrize("text", WITH_SECRET)
def test_a_secret_is_found_wherever_it_stands(text):
    for value in (text, [text], {"a": {"b": (text,)}}, Part("a", (text,))):
        for hide in (without_secrets, publishable):
            found = hide(value)
            assert SECRET not in repr(found)
            assert type(found) is type(value)
            assert hide(found) == found


@pytest.mark.parametrize("name", ["token", "hub_token", "HF_TOKEN", "password", "api_key", "aws_secret", "access-key"])
def test_what_is_named_like_a_secret_is_left_out(name):
    assert without_secrets({name: SECRET, "seed": 1}) == {"seed": 1}


@pytest.mark.parametrize("text", HARMLESS)
def test_everything_else_stays(text):
    assert publishable(text) == text


@pytest.mark.parametrize("path", LOCAL)
def test_of_a_local_path_the_last_part_is_published(path):
    assert without_secrets(path) == path
    assert publishable(path) == "pictures"
    if " " not in path:
        assert publishable(f"images of {path}; seed 1") == "images of pictures; seed 1"


@given(st.recursive(st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(), lambda x: st.lists(x)))
def test_numbers_stay_as_they_are(value):
    assert publishable(value) == value
