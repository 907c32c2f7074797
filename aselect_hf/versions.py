"""Hardware and package versions for reports, because they affect the last digits of results."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
FLOAT16 = {"avx512_fp16", "amx_fp16", "asimdhp"}
"""Names by which the system lists x86 and Arm instructions for a precision."""
PACKAGES = ("aselect-hf", "torch", "transformers", "diffusers", "scikit-learn", "numpy")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute results, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"torch": torch.__version__}  # with its build (+cu124), which metadata may lack


def hardware(device: torch.device) -> str:
    """Describe the processor or GPU of a device; for a processor, also the instructions that torch uses."""
    if device.type == "cpu":
        bfloat16 = ", bf16 instructions" if BFLOAT16 & _cpu_flags() else ""
        return f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}{bfloat16}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def slow_precision(device: torch.device, precision: str, instead: str) -> str | None:
    """A warning if the processor only emulates a 16-bit precision; `None` if it does not or this is unknown.

    Args:
        precision: `"bf16"` or `"bfloat16"`, `"fp16"` or `"float16"`; other names give `None`.
        instead: the option that selects float32, for the warning.
    """
    instructions = {"bf16": BFLOAT16, "bfloat16": BFLOAT16, "fp16": FLOAT16, "float16": FLOAT16}.get(precision)
    flags = _cpu_flags()
    if device.type != "cpu" or instructions is None or not flags or instructions & flags:
        return None
    return (
        f"{precision} on this processor ({_processor()}) is several times slower than float32, because the processor "
        f"has no instructions for it; use {instead}"
    )


def _processor() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    """Instructions of an x86 or Arm processor by their Linux names; empty on other systems."""
    return set((_cpu_info("flags") or _cpu_info("Features") or "").split())


def _cpu_info(field: str) -> str | None:
    """A field of the first processor's description on Linux; `None` on other systems."""
    if not CPU_INFO.is_file():
        return None
    lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.partition(":")[0].strip() == field), None)
