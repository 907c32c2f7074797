"""A 16-bit precision that the processor only emulates is said, with the faster choice."""

from __future__ import annotations

import pytest
import torch

from aselect_cli import app
from aselect_hf import versions
from aselect_hf.versions import hardware, slow_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AVX2 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx avx2 avx512f\n"
SAPPHIRE = "model name\t: Other CPU\nflags\t\t: avx512f avx512_bf16 avx512_fp16 amx_bf16\n"
ARM = "processor\t: 0\nBogoMIPS\t: 2.0\nFeatures\t: fp asimd asimdhp {}\n"


@pytest.fixture
def on(tmp_path, monkeypatch):
    """`on(text)`: a machine whose /proc/cpuinfo says so; `None`: one that has none."""

    def pretend(text: str | None) -> None:
        monkeypatch.setattr(versions, "CPU_INFO", tmp_path / "cpuinfo")
        if text is not None:
            (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")

    return pretend


@pytest.mark.parametrize("precision", ["bf16", "bfloat16", "fp16", "float16"])
def test_a_processor_without_the_instructions_is_named_with_the_way_out(on, precision):
    on(AVX2)
    assert slow_precision(CPU, precision, "--dtype float32") == (
        f"{precision} on this processor (Some CPU) is several times slower than float32, because the processor has no "
        "instructions for it; use --dtype float32"
    )


@pytest.mark.parametrize(
    ("machine", "precision", "device"),
    [
        (AVX2, "no", CPU),
        (AVX2, "float32", CPU),
        (AVX2, "bf16", CUDA),
        (SAPPHIRE, "bf16", CPU),
        (SAPPHIRE, "float16", CPU),
        (ARM.format("bf16"), "bf16", CPU),
        (ARM.format("bf16"), "fp16", CPU),
        (None, "bf16", CPU),
        ("model name\t: unfinished\n", "bf16", CPU),
    ],
)
def test_others_are_not_warned(on, machine, precision, device):
    on(machine)
    assert slow_precision(device, precision, "--dtype float32") is None


def test_arm_without_bf16_is_warned(on):
    on(ARM.format(""))
    assert "has no instructions for it" in str(slow_precision(CPU, "bf16", "--mixed_precision no"))


def test_the_command_says_it_once_before_it_works(on, capsys):
    on(AVX2)
    app.app(["features", "sample", "--list", "--dtype", "bfloat16", "--device", "cpu"], standalone_mode=False)
    output = capsys.readouterr()
    assert output.err.count("warning: bfloat16 on this processor (Some CPU) is several times slower") == 1
    assert "use --dtype float32" in output.err


def test_hardware_names_what_decides_digits_and_speed(on):
    on(SAPPHIRE)
    assert hardware(CPU).startswith("Other CPU, ")
    assert hardware(CPU).endswith(f" cores, {torch.backends.cpu.get_cpu_capability()}, bf16 instructions")
    on(AVX2)
    assert hardware(CPU).endswith(f" cores, {torch.backends.cpu.get_cpu_capability()}")
