"""Which files are fetched from a repository that holds more than the model: counted at a loopback Hub."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from aselect_hf import ASelectDiTModel
from aselect_hf.conversion import load_checkpoint, load_model, locate, save_model

from .server import Blob, Commit, HubServer, Repository

JUNK = Blob(b"0" * 1000, is_lfs=False)
EXTRA = (
    "text_encoder/model.safetensors", "text_encoder/config.json", "tokenizer/tokenizer.json", "unet.safetensors",
    "safety_checker/model.safetensors", "checkpoint-500/model.safetensors", "checkpoint-500/optimizer.bin",
    "vae/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.non_ema.safetensors",
    "transformer/diffusion_pytorch_model.bin", "model.onnx", "training.json", "pytorch_model.bin",
)  # fmt: skip
"""What repositories hold beside what is needed, up to tens of gigabytes of it."""


@pytest.fixture
def online(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., set[str]]]:
    """`online(load, ...)`: what the real client fetches in a call, from the loopback Hub into a cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    client = functools.partial(huggingface_hub.snapshot_download, endpoint=hub.url)
    monkeypatch.setattr(locate, "snapshot_download", client)

    def fetched(load: Callable[..., Any], *args: Any, **kwargs: Any) -> set[str]:
        hub.requests.clear()
        load(*args, **kwargs)
        downloads = (re.match(r"GET /[^/]+/[^/]+/resolve/[^/]+/(\S+) 200", line) for line in hub.requests)
        return {match[1].replace("%2F", "/") for match in downloads if match}

    return fetched


def publish(
    hub: HubServer,
    repo_id: str,
    folder: Path,
    extra: tuple[str, ...] = EXTRA,
    private: bool = False,
    gated: bool = False,
) -> None:
    """A repository of a folder's files, and of files that nobody needs."""
    repository = Repository(repo_id, private, gated)
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    blobs = dict.fromkeys(extra, JUNK) | {name: Blob(path.read_bytes(), is_lfs=False) for name, path in files.items()}
    repository.publish("refs/heads/main", Commit(blobs, None, repository.owner, "model"))
    hub._repositories[repo_id] = repository


@pytest.fixture
def pipeline(randomize: Callable[..., Any], tiny_kl: AutoencoderKL, tmp_path: Path) -> Path:
    """A pipeline whose transformer is in shards."""
    folder = tmp_path / "pipeline"
    transformer = randomize(
        DiTTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=8,
            num_layers=2,
            num_embeds_ada_norm=7,
            in_channels=4,
            sample_size=8,
        )
    )
    transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    tiny_kl.save_pretrained(folder / "vae")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "LICENSE").write_text("Be kind.")
    return folder


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("allow_pickle", [False, True], ids=["safetensors", "pickles allowed"])
def test_a_pipeline_is_fetched_by_component_and_index(
    hub: HubServer, online: Callable[..., set[str]], pipeline: Path, allow_pickle: bool
) -> None:
    publish(hub, "ada/pipeline", pipeline)
    assert len(list((pipeline / "transformer").glob("*.safetensors"))) > 1
    found = online(load_checkpoint, "ada/pipeline", allow_pickle=allow_pickle)
    assert found == files_of(pipeline)
    assert online(load_checkpoint, "ada/pipeline", allow_pickle=allow_pickle) == set(), "all of it is in the cache"
    assert online(load_checkpoint, "ada/pipeline", local_files_only=True) == set()
    assert hub.requests == []


def test_a_vae_that_is_replaced_is_not_fetched(
    hub: HubServer, online: Callable[..., set[str]], pipeline: Path, tiny_kl: AutoencoderKL
) -> None:
    publish(hub, "ada/pipeline", pipeline)
    found = online(ASelectDiTModel.from_diffusers, "ada/pipeline", vae=tiny_kl)
    assert {name for name in found if name.startswith("vae/")} <= {"vae/config.json"}


def test_a_subfolder_and_a_variant(hub: HubServer, online: Callable[..., set[str]], pipeline: Path) -> None:
    """Of two variants of one model, one is fetched; of the VAE, which has none, the only one."""
    transformer = DiTTransformer2DModel.from_pretrained(pipeline / "transformer").half()
    transformer.save_pretrained(pipeline / "transformer", variant="fp16", max_shard_size="20KB")
    publish(hub, "ada/variants", pipeline)
    found = online(load_checkpoint, "ada/variants", variant="fp16")
    assert any("fp16" in name for name in found)
    assert all("fp16" in name for name in found if name.endswith(".safetensors") and name.startswith("transformer"))
    assert "vae/diffusion_pytorch_model.safetensors" in found
    publish(hub, "ada/folder", pipeline)
    found = online(load_checkpoint, "ada/folder", subfolder="transformer")
    assert {name.partition("/")[0] for name in found} == {"transformer", "README.md", "LICENSE"}


def test_our_own_checkpoint(hub: HubServer, online: Callable[..., set[str]], make_model: Any, tmp_path: Path) -> None:
    save_model(make_model(num_channels=3), tmp_path / "model")
    publish(hub, "ada/ours", tmp_path / "model")
    needed = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert online(load_model, "ada/ours") == needed


def test_pickles_are_fetched_only_where_there_is_nothing_else(
    hub: HubServer, online: Callable[..., set[str]], pipeline: Path, tmp_path: Path
) -> None:
    weights = DiTTransformer2DModel.from_pretrained(pipeline / "transformer").state_dict()
    for path in (pipeline / "transformer").glob("*.safetensors*"):
        path.unlink()
    torch.save(weights, pipeline / "transformer" / "diffusion_pytorch_model.bin")
    publish(hub, "ada/pickles", pipeline, extra=("text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.bin"))
    with pytest.raises(ValueError, match="holds no weights"):
        online(load_checkpoint, "ada/pickles")
    assert not any(line.split()[1].endswith(".bin") for line in hub.requests)
    found = online(load_checkpoint, "ada/pickles", allow_pickle=True)
    assert {name for name in found if name.endswith(".bin")} == {"transformer/diffusion_pytorch_model.bin"}


def test_revision_and_token_reach_the_hub(
    hub: HubServer, online: Callable[..., set[str]], make_model: Any, tmp_path: Path
) -> None:
    for timestep in (100, 200):
        save_model(make_model(num_channels=3, timestep=timestep), tmp_path / str(timestep))
    publish(hub, "ada/private", tmp_path / "200", private=True)
    repository = hub._repositories["ada/private"]
    files = {path.name: Blob(path.read_bytes(), is_lfs=False) for path in (tmp_path / "100").iterdir()}
    repository.publish("refs/tags/v1", Commit(files, None, "ada", "earlier"))
    found = []
    online(lambda: found.append(load_model("ada/private", token="hf_ada")))
    online(lambda: found.append(load_model("ada/private", token="hf_ada", revision="v1")))
    assert [model.config.timestep for model in found] == [200, 100]
    publish(hub, "ada/secret", tmp_path / "200", private=True)
    with pytest.raises(ValueError, match="nor reachable on the Hub"):
        online(load_model, "ada/secret", token="hf_bob")
    with pytest.raises(ValueError, match="nor reachable on the Hub"):
        online(load_model, "ada/private", token="hf_ada", revision="v9")
