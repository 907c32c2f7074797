"""JSON that was read back has the types that it was written with, or the field that has not is named."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

MAX_SHOWN = 60


def check_types(content: Any, kind: Any) -> None:
    """Compare JSON with a type.

    Args:
        content: as `json.loads` returns it.
        kind: a dataclass, a `TypedDict`, or any other type; further fields are allowed.

    Raises:
        ValueError: a field is missing or has another type: which, and what it holds.
    """
    try:
        TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        field = ".".join(map(str, wrong["loc"])) or "the file"
        if wrong["type"] == "missing":
            raise ValueError(f"field {field} is missing") from error
        found = repr(wrong["input"])
        shown = found if len(found) <= MAX_SHOWN else found[:MAX_SHOWN] + "..."
        reason = wrong["msg"].removeprefix("Input ").removeprefix("Value error, ")
        raise ValueError(f"{field}: {reason}, got {shown}") from error
