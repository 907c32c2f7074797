"""Checkpoints in, checkpoints out: diffusers DiT, original DiT `.pt`, SiT `.pt`, and back to diffusers.

What each source decides, beside its weights:

| source    | noise schedule             | network's time    | timestep frequencies | second norm's eps |
|-----------|----------------------------|-------------------|----------------------|-------------------|
| diffusers | its scheduler's config     | t                 | shift 1              | `norm_eps`        |
| DiT `.pt` | DDPM, linear betas         | t                 | shift 0              | 1e-6              |
| SiT `.pt` | flow matching, velocity    | 1 - t / 1000      | shift 0              | 1e-6              |
| REPA, SRA | flow matching, velocity    | t / 1000          | shift 0              | 1e-6              |

The published DiT-XL/2 was trained with shift 0; diffusers runs it with shift 1. A conversion keeps what its source
computes, bit for bit; pass `timestep_freq_shift=0` to undo that for facebook's diffusers repositories.
"""

from aselect_hf.conversion.assemble import DERIVED_KEYS, load_vae, set_vae
from aselect_hf.conversion.convert import convert_checkpoint, head_class, load_checkpoint, load_model, save_model
from aselect_hf.conversion.diffusers_any import from_diffusers
from aselect_hf.conversion.diffusers_dit import HOOKED, diffusers_peer, load_diffusers, save_diffusers, to_diffusers
from aselect_hf.conversion.locate import LICENSE_FILES, detect_format

__all__ = [
    "DERIVED_KEYS",
    "HOOKED",
    "LICENSE_FILES",
    "convert_checkpoint",
    "detect_format",
    "diffusers_peer",
    "from_diffusers",
    "head_class",
    "load_checkpoint",
    "load_diffusers",
    "load_model",
    "load_vae",
    "save_diffusers",
    "save_model",
    "set_vae",
    "to_diffusers",
]
