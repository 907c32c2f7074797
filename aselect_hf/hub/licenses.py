"""Licenses of derived weights, which may not be less restrictive than the base model's.

Only the obligations that the names of common licenses imply are compared. This catches slips; it is not legal advice.
"""

from __future__ import annotations

from aselect_hf.conversion.licenses import COPYLEFT, PERMISSIVE, PUBLIC_DOMAIN, License, normalize_license
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig

ATTRIBUTION, SHARE_ALIKE, NON_COMMERCIAL, NO_DERIVATIVES = "by", "sa", "nc", "nd"
SPECIAL = {
    NON_COMMERCIAL: "It does not permit commercial use.",
    NO_DERIVATIVES: "It does not permit to share changed versions.",
}
GATED = "The base model is gated: its terms have to be accepted on its page."


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


def special_terms(config: NoisyBackboneConfig) -> list[str]:
    """What is special in the terms of the base model, in sentences; empty if they are common and permit most uses.

    Licenses that are not known here may restrict anything, so that they are special.
    """
    license = normalize_license(config.base_model_license)
    if license is None:
        return [GATED] if config.base_model_gated else []
    asked = restrictions(license)
    if asked is None:
        sentences = ["It has conditions of its own."]
    else:
        sentences = [text for restriction, text in SPECIAL.items() if restriction in asked]
    return sentences + ([GATED] if config.base_model_gated else [])


def base_license(config: NoisyBackboneConfig) -> str:
    """The license of the base model in words: its name, and where its text is."""
    license = normalize_license(config.base_model_license) or "no stated license"
    names = [license] if isinstance(license, str) else license
    link = config.base_model_license_link
    return ", ".join([*names, *filter(None, [config.base_model_license_name])]) + (f" ({link})" if link else "")


def check_base_license(config: NoisyBackboneConfig, accepted: bool) -> None:
    """Refuse to push weights that derive from others under special terms, unless the user accepts these.

    Raises:
        ValueError: the terms are special and not accepted; the message names the license and what is special.
    """
    if accepted or not (special := special_terms(config)):
        return
    origin = f" from {config.base_model}" if config.base_model else ""
    raise ValueError(
        f"these weights derive{origin} under the license {base_license(config)}. {' '.join(special)} Read it, and if "
        "it permits you to publish them, pass accept_base_license=True (--accept-base-license)"
    )


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
