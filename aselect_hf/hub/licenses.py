"""Licences of derived weights: a model may not claim fewer restrictions than the model it came from.

Only the obligations that the names of common licences stand for; a check against slips, not legal advice.
"""

from __future__ import annotations

ATTRIBUTION, SHARE_ALIKE, NON_COMMERCIAL, NO_DERIVATIVES = "by", "sa", "nc", "nd"
PUBLIC_DOMAIN = ("cc0-1.0", "unlicense", "wtfpl", "pddl", "zlib", "0bsd")
PERMISSIVE = (
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "afl-3.0", "ecl-2.0",
    "artistic-2.0", "bsl-1.0", "ms-pl", "postgresql", "ncsa",
)  # fmt: skip
COPYLEFT = (
    "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "epl-1.0", "epl-2.0",
    "eupl-1.1", "eupl-1.2", "osl-3.0",
)  # fmt: skip


def restrictions(license: str) -> frozenset[str] | None:
    """What a licence, by its Hub identifier, asks of who passes the work on; `None` for one not known here."""
    if license in PUBLIC_DOMAIN:
        return frozenset()
    if license in PERMISSIVE:
        return frozenset({ATTRIBUTION})
    if license in COPYLEFT:
        return frozenset({ATTRIBUTION, SHARE_ALIKE})
    if license.startswith("cc-by"):
        return frozenset(license.split("-")) & {ATTRIBUTION, SHARE_ALIKE, NON_COMMERCIAL, NO_DERIVATIVES}
    return None


def inherited_license(base: str | None, claimed: str | None) -> str | None:
    """The licence of a model derived from one under `base`, whose author claims `claimed` (`None`: no claim).

    Raises:
        ValueError: the claim is freer than the base, or cannot be compared with it.
    """
    base, claimed = (name.lower() if name else None for name in (base, claimed))
    if base is None or claimed is None or base == claimed:
        return claimed or base
    asked, offered = restrictions(base), restrictions(claimed)
    if asked is None or offered is None:
        raise ValueError(
            f"license {claimed!r} cannot be compared with the base model's {base!r}: leave it out to inherit that"
        )
    same_license = asked & {SHARE_ALIKE, NO_DERIVATIVES}
    if same_license or asked - offered:
        reason = "must be passed on unchanged" if same_license else "is more restrictive"
        raise ValueError(
            f"license {claimed!r} is refused: the base model's {base!r} {reason}; leave it out to inherit that"
        )
    return claimed
