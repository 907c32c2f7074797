"""Launches that silently start fewer processes than asked for end in one line, and the command in it works."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from aselect_hf.training.processes import _asked_of_accelerate, _launch_arguments, check_num_processes, this_process

# It imports copies of two files: importing the whole package would take most of the time of the test.
SCRIPT = r"""
from accelerate import Accelerator
from aselect_errors import one_line_errors
from aselect_processes import check_num_processes

accelerator = Accelerator()
with one_line_errors("script"):
    check_num_processes(accelerator)
print(f"trains on {accelerator.num_processes}\n", end="", flush=True)
"""


@pytest.fixture
def script(tmp_path) -> Path:
    package = Path(sys.modules["aselect_hf"].__file__).parent
    for module in (package / "errors.py", package / "training" / "processes.py"):
        (tmp_path / f"aselect_{module.name}").write_text(module.read_text())
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("ACCELERATE_USE_CPU", "LOCAL_RANK", "WORLD_SIZE")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    environment = inherited | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)


def command_that_works(script: Path) -> str:
    return f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 {script} --learning_rate 0.1"


def test_accelerate_launch_on_cpu_ends_in_one_line(script):
    launch = ("accelerate.commands.launch", "--cpu", "--num_processes", "2")
    done = run(*launch, "--quiet", str(script), "--learning_rate", "0.1")
    assert done.returncode != 0
    assert "trains on" not in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "script: error: accelerate launch requested 2 processes, but this run has 1 on cpu; "
        f"start it as: {command_that_works(script)}"
    )


def test_the_command_in_that_line_works(script):
    arguments = command_that_works(script).split()[3:]
    done = run("accelerate.commands.launch", "--main_process_port", "0", *arguments, ACCELERATE_USE_CPU="true")
    assert done.stdout.splitlines() == ["trains on 2"] * 2, done.stderr


def test_torchrun_without_gpu_starts_strangers(script):
    done = run("torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script))
    assert done.returncode != 0
    assert "trains on" not in done.stdout
    assert "script: error: the launcher requested 2 processes, but this run has 1 on cpu" in done.stderr


def test_expected_is_compared():
    accelerator = Accelerator(cpu=True)
    check_num_processes(accelerator)
    check_num_processes(accelerator, expected=1)
    with pytest.raises(ValueError, match="num_processes requested 3 processes, but this run has 1 on cpu"):
        check_num_processes(accelerator, expected=3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        check_num_processes(accelerator, expected=0)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("/usr/bin/python3 /opt/bin/accelerate launch --cpu s.py -x", "--cpu s.py -x"),
        ("python -m accelerate.commands.launch -m module", "-m module"),
        ("accelerate-launch s.py", "s.py"),
        ("python s.py accelerate", None),
        ("torchrun --nproc_per_node 2 s.py", None),
        ("", None),
    ],
)
def test_command_lines_of_accelerate(command, arguments):
    assert _launch_arguments(command.split()) == (arguments.split() if arguments else None)


def test_the_number_asked_of_accelerate(tmp_path, monkeypatch):
    monkeypatch.setattr("aselect_hf.training.processes.default_config_file", str(tmp_path / "default.yaml"))
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    config = ["--config_file", "two.yaml"]
    assert _asked_of_accelerate([*config, "s.py", "--num_processes", "9"], str(tmp_path)) == 2
    assert _asked_of_accelerate([*config, "--num-processes=4", "s.py"], str(tmp_path)) == 4
    assert _asked_of_accelerate(["s.py"], str(tmp_path)) == 0
    (tmp_path / "two.yaml").rename(tmp_path / "default.yaml")
    assert _asked_of_accelerate(["s.py"], str(tmp_path)) == 2
    assert _asked_of_accelerate(["--cpu", "s.py"], str(tmp_path)) == 0


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_of_a_machine_warns(monkeypatch, caplog, first):
    state = SimpleNamespace(is_local_main_process=first)
    monkeypatch.setattr("aselect_hf.training.processes.PartialState", lambda cpu: state)
    try:
        assert this_process() is state
        logging.getLogger("aselect_hf.data.image_data").warning("3 of 9 images have no label")
        logging.getLogger("other").warning("something else")
    finally:
        logging.getLogger("aselect_hf").setLevel(logging.NOTSET)
    assert ("have no label" in caplog.text) == first
    assert "something else" in caplog.text
