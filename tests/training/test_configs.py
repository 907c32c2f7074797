"""The accelerate config files: accelerate knows every key, and their first line is the command that launches them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from aselect_hf import ASelectDiTConfig, ASelectDiTModel
from aselect_hf import training as package
from aselect_hf.training.pretrain import DenoisingObjective
from aselect_hf.training.sharding import prepare_sharding

FOLDER = Path(package.__file__).parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
EXPECTED = {
    "cpu": (DistributedType.NO, 1, 1, "no"),
    "deepspeed": (DistributedType.DEEPSPEED, 1, 8, "bf16"),
    "fsdp2": (DistributedType.FSDP, 1, 8, "bf16"),
    "multi_gpu": (DistributedType.MULTI_GPU, 1, 8, "bf16"),
    "multi_node": (DistributedType.MULTI_GPU, 2, 16, "bf16"),
    "one_gpu": (DistributedType.NO, 1, 1, "bf16"),
}


def launch_arguments(*arguments: str):
    """The arguments of `accelerate launch` after the config file has been read into them."""
    return _validate_launch_command(launch_command_parser().parse_args([*arguments, "script.py"]))[0]


def test_every_config_is_expected():
    assert [file.stem for file in FILES] == sorted(EXPECTED)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file):
    config = load_config_from_file(str(file))  # refuses unknown keys
    assert isinstance(config, ClusterConfig)
    found = (config.distributed_type, config.num_machines, config.num_processes, config.mixed_precision)
    assert found == EXPECTED[file.stem]
    known = set(vars(launch_command_parser().parse_args(["script.py"])))
    nested = [value for value in yaml.safe_load(file.read_text()).values() if isinstance(value, dict)]
    assert all(set(section) <= known for section in nested)  # these keys accelerate does not check itself


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_first_line_launches_it(file):
    words = shlex.split(file.read_text().splitlines()[0])
    assert words[:3] == ["#", "accelerate", "launch"]
    args = launch_command_parser().parse_args(words[3:])
    assert Path(args.config_file).parts == ("aselect_hf", "training", "configs", file.name)
    assert args.module
    assert args.training_script.startswith("aselect_hf.training.")


def test_fsdp_leaves_the_layers_to_the_model():
    """So that one config serves every family: `prepare_sharding` names the layers of the backbone that trains."""
    args = launch_arguments("--config_file", str(FOLDER / "fsdp2.yaml"))
    environment = prepare_multi_gpu_env(args)
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    objective = DenoisingObjective(ASelectDiTModel(ASelectDiTConfig(hidden_size=16, num_attention_heads=2)))
    prepare_sharding(Accelerator(cpu=True), objective)
    assert objective._no_split_modules == ["ASelectDiTLayer"]  # what trains: no fixed layer


def test_the_second_node_overrides_its_rank():
    args = launch_arguments("--config_file", str(FOLDER / "multi_node.yaml"), "--machine_rank", "1")
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "8")
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "192.168.0.1:29500")


def test_the_cpu_config_launches(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from accelerate import Accelerator\na = Accelerator()\nprint(a.num_processes, a.device.type)\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "cpu.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 cpu"
