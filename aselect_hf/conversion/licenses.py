"""Licenses in model cards, read leniently because people write them in many ways."""

from __future__ import annotations

import re
from typing import Any

License = str | list[str]

PUBLIC_DOMAIN = ("cc0-1.0", "unlicense", "wtfpl", "pddl", "zlib", "0bsd")
PERMISSIVE = (
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "afl-3.0", "ecl-2.0",
    "artistic-2.0", "bsl-1.0", "ms-pl", "postgresql", "ncsa",
)  # fmt: skip
COPYLEFT = (
    "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "epl-1.0", "epl-2.0",
    "eupl-1.1", "eupl-1.2", "osl-3.0",
)  # fmt: skip
CREATIVE_COMMONS = re.compile(r"cc-by(-(nc|sa|nd))*(-\d\.\d)?")

REWRITTEN = (
    (r"^the-|^gnu-|-licen[cs]e\b|-mit$|-(only|or-later)$|-international$", ""),
    (r"^creative-commons-", "cc-"), ("attribution", "by"), ("non-?commercial", "nc"), ("share-?alike", "sa"),
    ("no-?deriv(ative)?s", "nd"), (r"^by-", "cc-by-"),
    (r"-?\b(version-|v\.?-?)(?=\d)|(?<=[a-z])v(?=\d)|(?<=[a-z])(?=\d)", "-"), ("-+", "-"),
    (r"^(apache|[al]?gpl|mpl|epl|eupl|osl|artistic|bsl|cc-by[-a-z]*)-(\d+)$", r"\1-\2.0"),
    (r"^apache$", "apache-2.0"), (r"^cc-0$", "cc0-1.0"),
)  # fmt: skip
"""Replacements, in this order, that turn common spellings into Hub identifiers; used only if the result is known."""


def normalize_license(value: Any) -> License | None:
    """A license as the Hub spells it (`"Apache 2.0"` becomes `"apache-2.0"`); a list only if there are several."""
    if isinstance(value, list | tuple):
        names = list(dict.fromkeys(name for each in value if isinstance(name := normalize_license(each), str)))
        return names[0] if len(names) == 1 else names or None
    if not isinstance(value, str) or not value.strip():
        return None
    slug = name = re.sub(r"[\s_,()]+", "-", value.strip().lower()).strip("-")
    for pattern, replacement in REWRITTEN:
        name = re.sub(pattern, replacement, name)
    known = name in (*PUBLIC_DOMAIN, *PERMISSIVE, *COPYLEFT) or CREATIVE_COMMONS.fullmatch(name)
    return name if known else slug


def license_fields(card: dict[str, Any], hub_id: str | None) -> dict[str, Any]:
    """The license in a card's metadata as fields of our config; a relative link becomes a URL.

    A card with `extra_gated_...` fields is that of a gated repository.
    """
    fields: dict[str, Any] = {"base_model_license": normalize_license(card.get("license"))}
    if any(str(name).startswith("extra_gated_") for name in card):
        fields["base_model_gated"] = True
    if fields["base_model_license"] != "other":
        return fields
    name, link = (str(card[key]) if card.get(key) else None for key in ("license_name", "license_link"))
    if link and hub_id and "://" not in link:
        link = f"https://huggingface.co/{hub_id}/blob/main/{link.removeprefix('./')}"
    return fields | {"base_model_license_name": name, "base_model_license_link": link}
