"""Conversion of checkpoints from diffusers DiT, original DiT `.pt` and SiT `.pt`, and back to diffusers.

Besides the weights, the source determines:

| source    | noise schedule             | network's time    | timestep frequencies | second norm's eps |
|-----------|----------------------------|-------------------|----------------------|-------------------|
| diffusers | its scheduler's config     | t                 | shift 1              | `norm_eps`        |
| DiT `.pt` | DDPM, linear betas         | t                 | shift 0              | 1e-6              |
| SiT `.pt` | flow matching, velocity    | 1 - t / 1000      | shift 0              | 1e-6              |
| REPA, SRA | flow matching, velocity    | t / 1000          | shift 0              | 1e-6              |

The published DiT-XL/2 was trained with shift 0, but diffusers runs it with shift 1. A converted model computes the same
as its source, bit for bit. For facebook's diffusers repositories, `timestep_freq_shift=0` restores the trained shift.
"""

from aselect_hf.conversion.assemble import DERIVED_KEYS, load_vae, set_vae
from aselect_hf.conversion.convert import convert_checkpoint, head_class, load_checkpoint, load_model, save_model
from aselect_hf.conversion.diffusers_dit import load_diffusers, save_diffusers, to_diffusers
from aselect_hf.conversion.locate import detect_format

__all__ = [
    "DERIVED_KEYS",
    "convert_checkpoint",
    "detect_format",
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
