"""Checkpoints from strangers: nothing in a config or weight file runs code, and nonsense is named."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from aselect_hf.conversion import load_model, save_model


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(make_model, tmp_path) -> Path:
    save_model(make_model(num_channels=3), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "24"}, "hidden_size must be an integer"),
        ({"hidden_size": 10**12}, "hidden_size must be an integer in 1..65536"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer in 1..1024"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be positive"),
        ({"mlp_ratio": 1e9}, "cannot be read"),
        ({"num_condition_classes": 10**10}, "num_condition_classes must be in 0..16777216"),
        ({"num_noise_draws": 10**9}, "num_noise_draws must be in 1..1024"),
        ({"sample_size": 65536, "image_size": 65536}, "stored noise values"),
        ({"noise_seed": 10**30}, "noise_seed must be in 0..2**63 - 1"),
        ({"noise_schedule": {"num_train_timesteps": 10**12}}, "num_train_timesteps must be an integer in 2..1000000"),
        ({"noise_schedule": {"trained_betas": "../x"}}, "trained_betas must be a list of numbers"),
        ({"feature": "../../etc/passwd"}, "feature '../../etc/passwd' is unknown"),
        ({"hidden_act": "os.system"}, "hidden_act 'os.system' is unknown"),
        ({"noise_schedule": {"type": "../x"}}, "noise_schedule type must be one of"),
        ({"noise_schedule": {"type": "ddpm", "path": "/etc"}}, "noise_schedule has unknown fields ['path']"),
        ({"vae_config": {"_class_name": "os.system"}}, "vae_config must describe an AutoencoderKL"),
        ({"model_type": "../x"}, "holds a model of type '../x'"),
    ],
)
def test_a_malicious_config_is_named(folder, fields, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_never_runs(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    torch.save({"patch_embedding.weight": Trap(tmp_path / "sprung")}, folder / name)
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(folder)
    assert not (tmp_path / "sprung").exists()


def test_code_beside_the_weights_is_not_run(folder, tmp_path):
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n"
    for name in ("modeling_aselect_dit.py", "configuration_aselect_dit.py", "handler.py"):
        (folder / name).write_text(trap)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_aselect_dit.ASelectDiTModel"}
    (folder / "config.json").write_text(json.dumps(config))
    load_model(folder)
    assert not (tmp_path / "sprung").exists()
