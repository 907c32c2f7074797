"""Example pictures for a model's page, with the model's answers, since the Hub does not run custom code.

A training script writes `widget.json` and its pictures `widget-*.png` beside the model. They are images of a data set,
so they are pushed only if its license permits sharing them.
"""

from __future__ import annotations

import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from typing_extensions import TypedDict

from aselect_hf.files import check_types, read_json
from aselect_hf.hub.licenses import NO_DERIVATIVES, restrictions

logger = logging.getLogger(__name__)

EXAMPLES_FILE = "widget.json"
PICTURES = "widget-*.png"


class Example(TypedDict):
    """An entry of `widget` in a card's metadata.

    `output` is a list of `{"label", "score"}`, or `{"url"}` of a picture.
    """

    src: str
    example_title: str
    output: list[dict[str, Any]] | dict[str, str]


class Examples(TypedDict):
    """`widget.json`: the examples, and the data set of their pictures."""

    dataset: str
    examples: list[Example]


def load_examples(folder: Path) -> Examples | None:
    """The examples beside a model; `None` if absent.

    Raises:
        ValueError: the file is invalid, or a picture is missing.
    """
    path = folder / EXAMPLES_FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        check_types(content, Examples)
        for name in pictures_of(content):
            if not fnmatch(name, PICTURES) or "/" in name or not (folder / name).is_file():
                raise ValueError(f"{name!r} is not a picture widget-*.png in this folder")
    except ValueError as error:
        raise ValueError(f"{path} does not hold the examples of a training ({error})") from error
    return content


def pictures_of(examples: Examples) -> list[str]:
    """Names of all pictures, those of the answers included."""
    outputs = [example["output"] for example in examples["examples"]]
    return [example["src"] for example in examples["examples"]] + [x["url"] for x in outputs if isinstance(x, dict)]


def may_share(dataset: str, api: HfApi) -> bool:
    """Whether pictures may be pushed: those of the sample, or of a public data set whose license permits sharing."""
    if dataset == "sample":
        return True
    try:
        info = api.dataset_info(dataset)
    except (HfHubHTTPError, HFValidationError):
        reason = "is not on the Hub"
    else:
        license = info.card_data.get("license") if info.card_data else None
        asked = restrictions(license) if isinstance(license, str) else None
        if info.private or info.gated:
            reason = "is not public"
        elif asked is None or NO_DERIVATIVES in asked:
            reason = f"has the license {license}"
        else:
            return True
    logger.warning(
        "example pictures are not pushed, because their data set %s %s: pass --examples (in training, --push_examples) "
        "if you may share them",
        dataset,
        reason,
    )
    return False
