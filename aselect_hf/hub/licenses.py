"""Licenses of derived weights: a model may not claim fewer restrictions than the model it came from.

Only the obligations that the names of common licenses stand for; a check against slips, not legal advice.
"""

from __future__ import annotations

from aselect_hf.conversion.licenses import COPYLEFT, PERMISSIVE, PUBLIC_DOMAIN, License, normalize_license

ATTRIBUTION, SHARE_ALIKE, NON_COMMERCIAL, NO_DERIVATIVES = "by", "sa", "nc", "nd"


def restrictions(license: License) -> frozenset[str] | None:
    """What a license, by its Hub identifier, asks of who passes the work on; `None` for one not known here.

    Several licenses ask for what any of them asks.
    """
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

    Both may be spelled as people spell them, and come back as the Hub spells them.

    Raises:
        ValueError: the claim is freer than the base, or cannot be compared with it.
    """
    base, claimed = normalize_license(base), normalize_license(claimed)
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
