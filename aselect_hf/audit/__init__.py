"""Check a chosen timestep on your own model and images, and say in one sentence whether to trust it."""

from aselect_hf.audit.audit import audit_timestep
from aselect_hf.audit.curves import NUM_AUDITED
from aselect_hf.audit.massive import MassiveChannels, find_massive_channels
from aselect_hf.audit.result import Audit
from aselect_hf.audit.verdicts import (
    ANY_TIMESTEP,
    DO_NOT_TRUST,
    TOLERANCE,
    TRUST,
    TRUSTED_UPPER,
    UNCERTAIN,
    VERDICTS,
    verdict_of,
    verdict_of_agreement,
)

__all__ = [
    "ANY_TIMESTEP",
    "DO_NOT_TRUST",
    "NUM_AUDITED",
    "TOLERANCE",
    "TRUST",
    "TRUSTED_UPPER",
    "UNCERTAIN",
    "VERDICTS",
    "Audit",
    "MassiveChannels",
    "audit_timestep",
    "find_massive_channels",
    "verdict_of",
    "verdict_of_agreement",
]
