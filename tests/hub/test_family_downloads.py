"""Which files of a text-to-image pipeline are fetched: counted at a loopback Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import sd3_pipeline

import aselect_hf
from aselect_hf.conversion import load_checkpoint, load_model, locate

from .server import Blob, Commit, HubServer
from .test_downloads import files_of, online, publish  # noqa: F401 (a fixture)

JUNK = (
    "sd3_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors", "comfy_example.json", "model.ckpt",
    "text_encoder/model.fp16.safetensors", "text_encoder_2/model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.bin", "text_encoder_3/model.safetensors",
)  # fmt: skip
"""What lies in such repositories beside the pipeline: single files and other variants, twice its size."""
CARD = "---\nlicense: other\nlicense_name: community\nlicense_link: LICENSE.md\n---\n"

Online = Callable[..., set[str]]


@pytest.fixture(scope="module")
def pipeline(randomize: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 of three blocks, whose transformer is in shards of about one block."""
    folder = tmp_path_factory.mktemp("pipeline")
    found = sd3_pipeline(tmp_path_factory.mktemp("tokenizer"), randomize)
    found.save_pretrained(folder)
    shutil.rmtree(folder / "transformer")
    found.transformer.save_pretrained(folder / "transformer", max_shard_size="40KB")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE.md").write_text("Be kind.")
    return folder


def shards(pipeline: Path, dropped: str = "nothing") -> set[str]:
    """The shards that hold a tensor whose name does not start with `dropped`."""
    index = json.loads((pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    return {f"transformer/{shard}" for name, shard in index["weight_map"].items() if not name.startswith(dropped)}


def weights(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith((".safetensors", ".bin", ".ckpt"))}


VAE = {"vae/diffusion_pytorch_model.safetensors"}
ENCODERS = {"text_encoder/model.safetensors", "text_encoder_2/model.safetensors"}


def test_only_the_shards_of_kept_blocks_are_fetched(hub: HubServer, online: Online, pipeline: Path) -> None:  # noqa: F811
    publish(hub, "ada/sd3", pipeline, JUNK)
    needed = shards(pipeline, ("transformer_blocks.1.", "transformer_blocks.2."))  # type: ignore[arg-type]
    assert len(needed) < len(shards(pipeline))
    models: list[Any] = []
    found = online(lambda: models.append(aselect_hf.from_diffusers("ada/sd3", feature="blocks.0.query")))
    assert weights(found) == needed | VAE | ENCODERS
    assert found - weights(found) <= files_of(pipeline)
    expected = aselect_hf.from_diffusers(pipeline, feature="blocks.0.query")
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-5, atol=1e-5)
    config = models[0].config
    link = "https://huggingface.co/ada/sd3/blob/main/LICENSE.md"
    assert (config.base_model, config.base_model_license_name, config.base_model_license_link) == (
        "ada/sd3",
        "community",
        link,
    )
    assert models[0].license_files == {"LICENSE.md": b"Be kind."}
    later = online(aselect_hf.from_diffusers, "ada/sd3", keep="all")
    assert later == shards(pipeline) - needed, "the others are fetched when they are needed"
    assert online(load_checkpoint, "ada/sd3", local_files_only=True) == set()
    assert hub.requests == []


def test_an_encoded_prompt_and_another_vae_need_no_other_weights(
    hub: HubServer, online: Online, pipeline: Path  # noqa: F811
) -> None:  # fmt: skip
    publish(hub, "ada/parts", pipeline, JUNK)
    prompt = {"prompt_embeds": torch.zeros(1, 5, 32), "pooled_prompt_embeds": torch.zeros(1, 16)}
    vae = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae")
    found = online(aselect_hf.from_diffusers, "ada/parts", prompt_embeds=prompt, vae=vae, keep="all")
    assert weights(found) == shards(pipeline)
    assert not any(name.startswith(("text_encoder", "tokenizer")) for name in found)
    found = online(
        aselect_hf.from_diffusers, "ada/parts", subfolder="transformer", prompt_embeds=prompt, keep="all",
        force_download=True, image_size=8,
    )  # fmt: skip
    assert weights(found) == shards(pipeline), "all are fetched again"


def test_one_variant_is_fetched(hub: HubServer, online: Online, pipeline: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(pipeline, tmp_path / "both")
    found: Any = diffusers.StableDiffusion3Pipeline.from_pretrained(pipeline, text_encoder_3=None, tokenizer_3=None)
    found.to(torch.float16)
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(found, part).save_pretrained(tmp_path / "both" / part, variant="fp16", max_shard_size="40KB")
    publish(hub, "ada/variants", tmp_path / "both", ())
    models: list[Any] = []
    names = online(lambda: models.append(load_checkpoint("ada/variants", variant="fp16", dtype="float32")))
    assert {"fp16" in name for name in weights(names) - VAE} == {True}
    assert weights(names) >= VAE, "it has no such variant"
    whole = aselect_hf.from_diffusers(pipeline)
    tensors = models[0].state_dict()
    assert all(torch.allclose(x, tensors[name], atol=0.02) for name, x in whole.state_dict().items())


def test_what_is_refused_costs_no_weights(hub: HubServer, online: Online, pipeline: Path, tmp_path: Path) -> None:  # noqa: F811
    publish(hub, "ada/refused", pipeline, JUNK)
    prompt = {"prompt_embeds": torch.zeros(1, 5, 31), "pooled_prompt_embeds": torch.zeros(1, 16)}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"feature": "blocks.9.query"}, "there is no block 9"),
        ({"guidance": 2.0}, "takes no guidance"),
        ({"prompt_embeds": prompt}, "prompt_embeds"),
        ({"skip_text_encoders": ["text_encoder_3"]}, "this pipeline has"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            online(aselect_hf.from_diffusers, "ada/refused", **arguments)
        assert not any("transformer/diffusion" in line or "text_encoder/model" in line for line in hub.requests)
    shutil.copytree(pipeline, tmp_path / "other")
    config = tmp_path / "other" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet2DConditionModel"}))
    publish(hub, "ada/other", tmp_path / "other", JUNK)
    for load in (aselect_hf.from_diffusers, load_model):
        with pytest.raises(ValueError, match=r"UNet2DConditionModel|from_diffusers"):
            online(load, "ada/other")
        with pytest.raises(ValueError, match="UNet2DConditionModel"):
            online(load, "ada/other", subfolder="transformer")
        assert not any(".safetensors" in line for line in hub.requests)


def test_all_files_are_of_one_commit(
    hub: HubServer, online: Online, pipeline: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Of a branch, even if somebody pushes to it between two files; and of a tag."""
    publish(hub, "ada/moving", pipeline, JUNK)
    repository = hub._repositories["ada/moving"]
    first = repository.refs["refs/heads/main"]
    repository.publish("refs/tags/v1", repository.commits[first])
    client = locate.snapshot_download

    def moving(*args: Any, **kwargs: Any) -> str:
        path = client(*args, **kwargs)
        files = dict(repository.commits[first].files) | {"new.txt": Blob(str(len(hub.requests)).encode(), is_lfs=False)}
        repository.publish("refs/heads/main", Commit(files, None, "ada", "another"))
        return path

    monkeypatch.setattr(locate, "snapshot_download", moving)
    for options in ({}, {"revision": "v1"}):
        online(aselect_hf.from_diffusers, "ada/moving", force_download=True, **options)
        downloads = [line.split("/resolve/")[1].split("/")[0] for line in hub.requests if "/resolve/" in line]
        assert len(downloads) > 5
        assert set(downloads) == ({first} if options else {downloads[0]})


@pytest.mark.parametrize("token", [False, "hf_bob"], ids=["not logged in", "not accepted"])
@pytest.mark.parametrize("name", ["pipeline", "transformer", "vae", "ours"])
def test_a_gated_repository_says_where_to_accept(
    hub: HubServer, online: Online, pipeline: Path, make_model: Any, tmp_path: Path, token: Any, name: str  # noqa: F811
) -> None:  # fmt: skip
    load: Callable[..., Any] = aselect_hf.from_diffusers
    folder = pipeline
    options: dict[str, Any] = {"token": token}
    if name == "transformer":
        prompt = {"prompt_embeds": torch.zeros(5, 32), "pooled_prompt_embeds": torch.zeros(16)}
        options |= {"subfolder": "transformer", "prompt_embeds": prompt, "image_size": 8}
    elif name == "vae":
        folder, load = pipeline / "vae", lambda repo, **kwargs: aselect_hf.from_diffusers(pipeline, vae=repo, **kwargs)
    elif name == "ours":
        make_model(num_channels=3).save_pretrained(tmp_path / "ours")
        folder, load = tmp_path / "ours", load_model
    publish(hub, f"ada/gated-{name}", folder, (), gated=True)
    with pytest.raises(ValueError) as raised:
        online(load, f"ada/gated-{name}", **options)
    expected = (
        f"checkpoint 'ada/gated-{name}' is gated: accept its terms at https://huggingface.co/ada/gated-{name}, "
        "then run `hf auth login`"
    )
    assert str(raised.value) == expected
    online(load, f"ada/gated-{name}", **(options | {"token": "hf_ada"}))
