"""Update a model card that people have edited: only the parts between markers are generated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from aselect_hf.hub.examples import PICTURES

REGION = re.compile(r"<!-- aselect:(?P<name>[a-z]+):begin -->.*?<!-- aselect:(?P=name):end -->[ \t]*\n{0,2}", re.DOTALL)
MARKER = re.compile(r"<!-- aselect:[a-z]+:(begin|end) -->")
GENERATED_METADATA = (
    "pipeline_tag",
    "base_model",
    "base_model_relation",
    "metrics",
    "model-index",
    "library_name",
    "widget",
)
SAMPLE_PICTURES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main"


def merge_cards(new: ModelCard, old: ModelCard) -> ModelCard:
    """Replace the generated parts of `old` by those of `new`, and keep all other text and metadata.

    Generated parts that `new` lacks are removed. Those that `old` lacks are inserted in the order of the template. A
    card without markers is kept in full, below the generated text.

    Raises:
        ValueError: a marker in `old` has no counterpart.
    """
    segments = list(_segments(old.text))
    for name, text in segments:
        if name is None and (lone := MARKER.search(text)):
            raise ValueError(f"README.md: {lone[0]} has no matching marker; restore that one, or remove this one")
    generated = {name: text for name, text in _segments(new.text) if name}
    segments = [(name, text) for name, text in segments if name is None or name in generated]
    position = 0
    for name, text in generated.items():
        places = [index for index, segment in enumerate(segments) if segment[0] == name]
        if places:
            position = places[0]
            segments[position] = (name, text)
        else:
            segments.insert(position, (name, text))
        position += 1
    body = "".join(text for _, text in segments)
    metadata = _merge_metadata(new.data.to_dict(), old.data.to_dict())
    return ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{body.strip()}\n")


def _segments(text: str) -> Iterator[tuple[str | None, str]]:
    """Split a card's text into `(name, generated text)` and `(None, other text)`, in order."""
    text, end = text.replace("\r\n", "\n").lstrip("\n") + "\n\n", 0
    for match in REGION.finditer(text):
        if match.start() > end:
            yield None, text[end : match.start()]
        yield match["name"], match[0].rstrip("\n") + "\n\n"
        end = match.end()
    if text[end:].strip():
        yield None, text[end:]


def _merge_metadata(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in old.items() if name not in GENERATED_METADATA}
    if new.get("license", old.get("license")) != old.get("license"):
        kept = {name: value for name, value in kept.items() if name not in ("license_name", "license_link")}
    merged = kept | new
    for name in ("tags", "datasets"):
        both: list[str] = [*_as_list(new.get(name)), *_as_list(old.get(name))]
        if both:
            merged[name] = list(dict.fromkeys(both))
    if own := [entry for entry in old.get("widget") or [] if not _is_generated(entry)]:
        merged["widget"] = own
    return merged


def _is_generated(example: Any) -> bool:
    """Whether an entry of `widget` was generated, from a training's pictures or the Hub's samples."""
    source = str(example.get("src")) if isinstance(example, dict) else ""
    return fnmatch(source, PICTURES) or source.startswith(SAMPLE_PICTURES)


def _as_list(value: Sequence[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
