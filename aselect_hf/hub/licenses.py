"""Licenses of derived weights, which may not be less restrictive than the base model's.

Only the obligations that the names of common licenses imply are compared. This catches slips; it is not legal advice.
"""

from __future__ import annotations

from aselect_hf.conversion.licenses import COPYLEFT, PERMISSIVE, PUBLIC_DOMAIN, License, normalize_license

ATTRIBUTION, SHARE_ALIKE, NON_COMMERCIAL, NO_DERIVATIVES = "by", "sa", "nc", "nd"


def restrictions(license: License) -> frozenset[str] | None:
    """Obligations of a license, by its Hub identifier, or of several together; `None` if one is unknown."""
    if isinstance(license, list):
        each = [restrictions(name) for name in license]
        known = [asked for asked in each if asked is not None]
        return frozenset().union(*known) if len(known) == len(each) else None
    if license in PUBLIC_DOMAIN:
        return frozenset()
    if license in PERMISSIVE:
        return frozenset({ATTRIBUTION})
    if license in COPYLEFT:
        return frozenset({ATTRIBUTION, SHARE_ALIKE})
    if license.startswith("cc-by"):
        return frozenset(license.split("-")) & {ATTRIBUTION, SHARE_ALIKE, NON_COMMERCIAL, NO_DERIVATIVES}
    return None


def inherited_license(base: License | None, claimed: License | None) -> License | None:
    """The license of a model derived from one under `base`, whose author claims `claimed` (`None`: no claim).

    Both may be spelled in common ways; the result is spelled as on the Hub.

    Raises:
        ValueError: the claim is less restrictive than the base, or cannot be compared with it.
    """
    base, claimed = normalize_license(base), normalize_license(claimed)
    if base is None or claimed is None or base == claimed:
        return claimed or base
    asked, offered = restrictions(base), restrictions(claimed)
    if asked is None or offered is None:
        raise ValueError(
            f"license {claimed!r} cannot be compared with the base model's {base!r}: omit it to inherit the latter"
        )
    same_license = asked & {SHARE_ALIKE, NO_DERIVATIVES}
    if same_license or asked - offered:
        reason = "must be passed on unchanged" if same_license else "is more restrictive"
        raise ValueError(
            f"license {claimed!r} is refused: the base model's {base!r} {reason}; omit it to inherit the latter"
        )
    return claimed
