"""Pushing to the loopback Hub, and using what was pushed from a clean cache in a process without the package.

All pushing and loading runs in client processes: the process of the tests is offline for good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import CommitInfo, ModelCard

from .conftest import ClientProcess
from .server import HubServer

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2, "patch_size": 2,
    "sample_size": 8, "num_channels": 3, "num_condition_classes": 0, "timestep": 100,
}  # fmt: skip
CODE = {
    "configuration_aselect_dit.py", "features.py", "modeling_aselect_dit.py", "noise_schedule.py",
}  # fmt: skip


def save_model(folder: Path, seed: int) -> None:
    """A tiny model for color images, its selection, and the code that it needs elsewhere."""
    import torch

    from aselect_hf import ASelectDiTConfig, ASelectDiTModel, select_timestep
    from aselect_hf.conversion import save_model

    torch.manual_seed(seed)
    model = ASelectDiTModel(ASelectDiTConfig(**SHAPE, base_model="ada/base", base_model_license="cc-by-nc-4.0"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    selection = select_timestep(model.eval(), images, timesteps=[0, 100, 800], progress=False)
    save_model(selection.apply(model), folder)
    selection.save(folder / "selection.json")


def push(folder: Path, repo_id: str, **options: Any) -> CommitInfo:
    """`push_to_hub` of a saved model with its selection."""
    from aselect_hf import ASelectDiTModel, TimestepSelection, push_to_hub
    from aselect_hf.hub.results import EvaluationResult

    options["results"] = [EvaluationResult(**result) for result in options.get("results", [])]
    options.setdefault("accept_base_license", True)
    selection = TimestepSelection.load(folder / "selection.json") if options.pop("with_selection", True) else None
    return push_to_hub(ASelectDiTModel.from_pretrained(folder), repo_id, selection=selection, **options)


def push_command(*arguments: str) -> tuple[int, str]:
    """`aselect push`, as typed: exit code and what it printed."""
    import contextlib
    import io
    import sys

    from aselect_cli import app

    printed, sys.argv = io.StringIO(), ["aselect", "push", *arguments]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            app.main()
        except SystemExit as exit:
            return int(exit.code or 0), printed.getvalue()
    return 0, printed.getvalue()


def picture() -> Any:
    from PIL import Image

    return Image.linear_gradient("L").resize((12, 10)).convert("RGB")


def features(source: str, cache: Path | None, forget_package: bool = True, **options: Any) -> tuple[str, Any, Any]:
    """The model's and the pipeline's answer to a picture, by the Auto classes alone."""
    import sys

    if forget_package:
        sys.modules["aselect_hf"] = None  # type: ignore[assignment]
    else:
        import aselect_hf  # noqa: F401
    import torch
    from transformers import AutoImageProcessor, AutoModel, pipeline

    options |= {"trust_remote_code": forget_package}
    processor = AutoImageProcessor.from_pretrained(source, cache_dir=cache, **options)
    model = AutoModel.from_pretrained(source, cache_dir=cache, **options).eval()
    with torch.inference_mode():
        tokens = model(**processor(images=picture(), return_tensors="pt")).last_hidden_state
    pipe = pipeline("image-feature-extraction", model=model, image_processor=processor, pool=True)
    return type(model).__module__, tokens.tolist(), pipe(picture())


def save_head(folder: Path, task: str) -> None:
    """A classifier or a segmenter with named labels, ready for its pipeline."""
    import torch

    import aselect_hf
    from aselect_hf.conversion import save_model

    torch.manual_seed(0)
    labels = {0: "sky", 1: "sea", 2: "sand"}
    config = aselect_hf.ASelectDiTConfig(**SHAPE, id2label=labels, label2id={v: k for k, v in labels.items()})
    name = {"image-classification": "ASelectDiTForImageClassification"}.get(task, "ASelectDiTForSemanticSegmentation")
    model = getattr(aselect_hf, name)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(model.eval(), folder)


def save_folded(folder: Path, family: str) -> None:
    """A classifier on the first blocks of a text-to-image network, with a fixed timestep."""
    import torch
    from modeling.tiny_transformers import TINY, store_prompt, tiny_config

    from aselect_hf import ASelectDiffusionForImageClassification
    from aselect_hf.conversion import save_model

    torch.manual_seed(0)
    labels = {0: "sky", 1: "sea", 2: "sand"}
    shape = TINY[family]["transformer_config"] | {"in_channels": 3}
    config = tiny_config(family, transformer_config=shape, kept_blocks=2, feature="blocks.1.query",
                         id2label=labels, label2id={v: k for k, v in labels.items()})  # fmt: skip
    model = ASelectDiffusionForImageClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(store_prompt(model.eval()).fix_timestep(300), folder)


def push_head(folder: Path, repo_id: str, task: str) -> CommitInfo:
    import transformers

    from aselect_hf import push_to_hub

    auto = {"image-classification": "AutoModelForImageClassification"}.get(task, "AutoModelForSemanticSegmentation")
    return push_to_hub(getattr(transformers, auto).from_pretrained(folder), repo_id)


def run_pipeline(task: str, source: str, forget_package: bool) -> list[tuple[str, Any]]:
    """What `pipeline(task, model=source)` says of a picture, twice: labels with scores, or with masks."""
    import sys

    if forget_package:
        sys.modules["aselect_hf"] = None  # type: ignore[assignment]
    import numpy as np
    from transformers import pipeline

    pipe = pipeline(task, model=source, trust_remote_code=forget_package)
    first, second = (
        [(x["label"], np.asarray(x.get("mask", x["score"])).tolist()) for x in pipe(picture())] for _ in "12"
    )
    assert first == second
    return first


def call_handler(repo_id: str, folder: Path) -> tuple[Any, ...]:
    """What an endpoint does: download the repository, import its `handler.py`, and call it for each request."""
    import base64
    import importlib.util
    import io
    import sys

    sys.modules["aselect_hf"] = None  # type: ignore[assignment]
    from huggingface_hub import snapshot_download

    path = snapshot_download(repo_id, local_dir=folder)
    spec = importlib.util.spec_from_file_location("handler", Path(path) / "handler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(path)
    buffer = io.BytesIO()
    picture().save(buffer, format="PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    requests = [picture(), encoded, f"data:image/png;base64,{encoded}", buffer.getvalue()]
    answers = [handler({"inputs": request}) for request in requests]
    batch = handler({"inputs": [encoded, encoded]})
    errors = []
    for request in ({}, {"inputs": "/etc/passwd"}, {"inputs": "http://localhost/x.png"}, {"inputs": 3}):
        with pytest.raises(ValueError, match="inputs") as failure:
            handler(request)
        errors.append(str(failure.value))
    with pytest.raises(ValueError, match=r"parameters \['path'\] are unknown"):
        handler({"inputs": encoded, "parameters": {"path": "/etc"}})
    return json.loads(json.dumps(answers)), batch, errors


@pytest.fixture(scope="module")
def stranger(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientProcess]:
    """A process, without a token and with an empty home, in which the package cannot be imported."""
    process = ClientProcess(hub.client_environment(tmp_path_factory.mktemp("stranger")))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def saved(client: ClientProcess, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`saved(seed)`: the folder of a saved model, made once for each seed."""
    root, made = tmp_path_factory.mktemp("saved"), set()

    def save(seed: int = 0) -> Path:
        if seed not in made:
            client.run(save_model, root / str(seed), seed)
            made.add(seed)
        return root / str(seed)

    return save


@pytest.fixture
def pushed(client: ClientProcess, saved: Callable[..., Path]) -> Callable[..., CommitInfo]:
    """`pushed(repo_id, seed=0, **options)`: push a saved model as ada."""
    return lambda repo_id, seed=0, **options: client.run(push, saved(seed), repo_id, **options)


def commits(hub: HubServer) -> int:
    return sum("/commit/" in line for line in hub.requests)


# -- what a push is --


def test_one_commit_holds_everything(hub, ada, pushed) -> None:
    result = {"dataset": "ada/flowers", "metric": "accuracy", "value": 0.5, "protocol": "a linear head on 10 images"}
    before = commits(hub)
    commit = pushed("ada/whole", results=[result], training={"steps": 3, "arguments": {"seed": 1}})
    assert commits(hub) == before + 1
    assert [entry.title for entry in ada.list_repo_commits("ada/whole")] == [
        "Push model with aselect-hf",
        "initial commit",
    ]
    files = hub.files("ada/whole")
    assert set(files) >= CODE | {
        "README.md", "config.json", "handler.py", "model.safetensors", "notebook.ipynb",
        "preprocessor_config.json", "selection.json", "selection.png", "training.json",
    }  # fmt: skip
    assert commit.commit_url == f"{hub.url}/ada/whole/commit/{commit.oid}"
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.pipeline_tag) == ("cc-by-nc-4.0", "image-feature-extraction")
    assert card.data.eval_results[0].metric_value == 0.5
    assert any("POST /api/validate-yaml" in line for line in hub.requests)


def test_a_clean_cache_gives_the_same_numbers(client, stranger, saved, pushed, tmp_path) -> None:
    first = pushed("ada/numbers")
    pushed("ada/numbers", seed=1)
    local = [client.run(features, str(saved(seed)), None, forget_package=False) for seed in (0, 1)]
    newest = stranger.run(features, "ada/numbers", tmp_path / "newest")
    pinned = stranger.run(features, "ada/numbers", tmp_path / "pinned", revision=first.oid, code_revision=first.oid)
    assert local[0][0] == "aselect_hf.modeling.modeling_aselect_dit"
    assert newest[0].startswith("transformers_modules.")
    assert newest[1:] == local[1][1:]
    assert pinned[1:] == local[0][1:]
    assert pinned[1] != newest[1]


@pytest.mark.parametrize("task", ["image-classification", "image-segmentation"])
def test_heads_and_their_pipelines_give_the_same_numbers(client, stranger, tmp_path, task) -> None:
    """Before the push, with the package; after it, from the Hub, in a process that cannot import the package."""
    client.run(save_head, tmp_path / task, task)
    client.run(push_head, tmp_path / task, f"ada/{task}", task)
    before = client.run(run_pipeline, task, str(tmp_path / task), False)
    after = stranger.run(run_pipeline, task, f"ada/{task}", True)
    assert [label for label, _ in after] == [label for label, _ in before]
    assert {label for label, _ in before} <= {"sky", "sea", "sand"}
    for (_, ours), (_, theirs) in zip(before, after, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-6) if isinstance(ours, float) else theirs == ours


@pytest.mark.parametrize(
    ("family", "network"),
    [("SD3", "network of image tokens and 5 text tokens"), ("PixArt-Sigma", "ViT"), ("Sana", "ViT")],
)
def test_a_fixed_text_to_image_network_classifies_without_the_package(
    hub, client, stranger, tmp_path, family, network
) -> None:
    task, repo = "image-classification", f"ada/fixed-{family}"
    client.run(save_folded, tmp_path / family, family)
    client.run(push_head, tmp_path / family, repo, task)
    before = client.run(run_pipeline, task, str(tmp_path / family), False)
    assert stranger.run(run_pipeline, task, repo, True) == [
        (label, pytest.approx(score, abs=1e-6)) for label, score in before
    ]
    files = hub.files(repo)
    assert {"folds.py", "folded_blocks.py", "folded_weights.py", "folded_joint.py", "folded_cross.py"} <= files.keys()
    folded = f"timestep, noise and prompt are folded into the weights, which leaves a plain {network} that computes"
    assert f"| fixed | {folded} `blocks.1.query` |" in files["README.md"].decode()


def test_second_push_keeps_what_people_wrote(hub, ada, pushed) -> None:
    pushed("ada/edited", training={"steps": 3})
    text = hub.files("ada/edited")["README.md"].decode()
    edited = text.replace("<!-- aselect:use:begin -->", "## Thanks\n\nTo everyone.\n\n<!-- aselect:use:begin -->")
    edited = edited.replace("library_name:", "language: en\nlibrary_name:") + "\nMy last words.\n"
    ada.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="ada/edited")
    mine = ("notes.txt", "adapter_model.safetensors", "onnx/model.safetensors", ".eval_results/mine.yaml")
    for path in mine:
        ada.upload_file(path_or_fileobj=b"mine", path_in_repo=path, repo_id="ada/edited")
    pushed("ada/edited", seed=1, with_selection=False)
    files = hub.files("ada/edited")
    renewed = files["README.md"].decode()
    assert renewed.count("## Thanks\n\nTo everyone.") == renewed.count("My last words.") == 1
    assert "language: en" in renewed
    assert renewed.index("## Thanks") < renewed.index("## How to use it")
    assert "## Training" not in renewed
    assert "training.json" not in files, "it describes the model before"
    assert "selection.json" not in files
    assert all(files[path] == b"mine" for path in mine)


def test_a_card_with_an_incomplete_index_is_renewed(ada, pushed) -> None:
    pushed("ada/incomplete")
    incomplete = "---\nlicense: cc-by-nc-4.0\nmodel-index: [{name: x, results: [{task: {type: a}}]}]\n---\nMine.\n"
    ada.upload_file(path_or_fileobj=incomplete.encode(), path_in_repo="README.md", repo_id="ada/incomplete")
    assert pushed("ada/incomplete", seed=1).oid


def test_a_card_with_broken_metadata_is_never_written_over(hub, ada, pushed) -> None:
    """What people wrote there cannot be kept, so nothing is pushed."""
    pushed("ada/broken")
    broken = b"---\nlicense: [mit\ntags: [mine]\n---\nMine.\n"
    ada.upload_file(path_or_fileobj=broken, path_in_repo="README.md", repo_id="ada/broken")
    with pytest.raises(ValueError, match=r"README\.md in ada/broken has broken metadata: repair it"):
        pushed("ada/broken", seed=1)
    assert hub.files("ada/broken")["README.md"] == broken


def test_branch_and_tag(hub, ada, pushed) -> None:
    pushed("ada/versions-of-mine")
    commit = pushed("ada/versions-of-mine", seed=1, revision="next", tag="v1")
    refs = ada.list_repo_refs("ada/versions-of-mine")
    assert {branch.name: branch.target_commit for branch in refs.branches}["next"] == commit.oid
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", commit.oid)]
    main = hub.files("ada/versions-of-mine")["model.safetensors"]
    assert main != hub.files("ada/versions-of-mine", "v1")["model.safetensors"]
    before = commits(hub)
    with pytest.raises(ValueError, match="tag 'v1' already exists"):
        pushed("ada/versions-of-mine", tag="v1")
    with pytest.raises(ValueError, match="tag and create_pr cannot be combined"):
        pushed("ada/versions-of-mine", tag="v2", create_pr=True)
    assert commits(hub) == before


def test_pull_request(hub, pushed) -> None:
    pushed("ada/reviewable")
    before = hub.files("ada/reviewable")
    commit = pushed("ada/reviewable", seed=1, create_pr=True, token="hf_bob")
    assert commit.pr_url == f"{hub.url}/ada/reviewable/discussions/1"
    assert hub.files("ada/reviewable") == before
    assert hub.files("ada/reviewable", "refs/pr/1")["model.safetensors"] != before["model.safetensors"]


def test_own_namespace_and_visibility(ada, bob, pushed) -> None:
    pushed("short-name", private=True)
    assert ada.model_info("ada/short-name").private is True
    assert not bob.repo_exists("ada/short-name")
    ada.create_repo("ada/open")
    with pytest.raises(ValueError, match="private=True, but ada/open is already public"):
        pushed("ada/open", private=True)
    assert ada.list_repo_files("ada/open") == [".gitattributes"]


# -- what goes wrong --


def test_refused_tokens(hub, ada, saved, pushed, tmp_path) -> None:
    from aselect_hf.hub import PushError

    with pytest.raises(PushError, match=r"push to ada/nobody failed \(401\).*the token is invalid"):
        pushed("ada/nobody", token="hf_wrong")
    nobody = ClientProcess(hub.client_environment(tmp_path))
    with pytest.raises(PushError, match=r"push to ada/nobody failed: no token; log in"):
        nobody.run(push, saved(), "ada/nobody")
    nobody.stop()
    with pytest.raises(PushError, match=r"\(403\).*may not write there"):
        pushed("ada/nobody", token="hf_bob")
    assert not ada.repo_exists("ada/nobody")
    with pytest.raises(ValueError, match="Repo id"):
        pushed("ada/../nobody")


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("PUT /lfs-upload/", 500, "Error while uploading"),
        ("/commit/", 500, r"\(500\)"),
        ("/commit/", 412, "someone else committed in the meantime: push again"),
        ("/preupload/", 403, "may not write there"),
        ("/api/validate-yaml", 400, "Invalid metadata in README"),
    ],
)
def test_no_half_repository(hub, pushed, path, status, message) -> None:
    from aselect_hf.hub import PushError

    repo_id = f"ada/half-{path.strip('/').split('/')[-1].split()[-1]}-{status}"
    first = pushed(repo_id)
    before = hub.files(repo_id)
    hub.fail_next(100, path, status)
    with pytest.raises((PushError, ValueError), match=message):
        pushed(repo_id, seed=1, tag="v1")
    hub.faults.clear()
    assert hub.files(repo_id) == before
    assert pushed(repo_id, seed=1, tag="v1").oid != first.oid
    assert hub.files(repo_id)["model.safetensors"] != before["model.safetensors"]


def test_a_freer_license_is_refused_before_anything_is_sent(hub, ada, pushed) -> None:
    with pytest.raises(ValueError, match="license 'mit' is refused"):
        pushed("ada/freer", license="mit")
    assert not ada.repo_exists("ada/freer")


# -- the command, the endpoint, trust --


def test_command(hub, client, saved) -> None:
    before = len(hub.requests)
    code, printed = client.run(push_command, str(saved()), "ada/typed", "--dry-run")
    assert code == 0
    assert "model.safetensors" in printed
    assert "## How to use it" in printed
    assert len(hub.requests) == before, "a dry run asks nobody"
    code, printed = client.run(push_command, str(saved()), "ada/typed")
    assert (code, printed.splitlines()[-1]) == (
        2,
        "aselect: error: these weights derive from ada/base under the license cc-by-nc-4.0. It does not permit "
        "commercial use. Read it, and if it permits you to publish them, pass accept_base_license=True "
        "(--accept-base-license)",
    )
    assert not any(word in line for line in hub.requests[before:] for word in ("create", "upload", "commit"))
    options = ("--private", "--tag", "v1", "--accept-base-license")
    code, printed = client.run(push_command, str(saved()), "ada/typed", *options)
    assert (code, printed.splitlines()[-1].startswith(f"pushed {hub.url}/ada/typed/commit/")) == (0, True)
    assert "selection.json" in hub.files("ada/typed", "v1")
    code, printed = client.run(push_command, str(saved()), "ada/typed", "--tag", "v1", "--accept-base-license")
    assert code == 2
    assert printed.splitlines()[-1] == "aselect: error: tag 'v1' already exists in ada/typed"


def test_endpoint_handler(client, stranger, saved, pushed, tmp_path) -> None:
    pushed("ada/served")
    expected = client.run(features, str(saved()), None, forget_package=False)[2]
    answers, batch, errors = stranger.run(call_handler, "ada/served", tmp_path / "endpoint")
    np.testing.assert_allclose(answers, [expected[0]] * 4, atol=1e-5)  # batches differ in the last bits
    np.testing.assert_allclose(batch, [expected[0]] * 2, atol=1e-5)
    assert len(errors) == 4


def load_without_trust(repo_id: str, cache: Path) -> str:
    import sys

    sys.modules["aselect_hf"] = None  # type: ignore[assignment]
    from transformers import AutoModel

    try:
        AutoModel.from_pretrained(repo_id, cache_dir=cache, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    return "loaded"


def load_with_package(repo_id: str, cache: Path) -> str:
    from transformers import AutoModel

    import aselect_hf  # noqa: F401

    return type(AutoModel.from_pretrained(repo_id, cache_dir=cache)).__module__


def test_code_of_a_repository_runs_only_when_trusted(hub, ada, client, stranger, pushed, tmp_path) -> None:
    pushed("ada/untrusted")
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n"
    for name in ("modeling_aselect_dit.py", "configuration_aselect_dit.py"):
        code = hub.files("ada/untrusted")[name].replace(b"\nfrom typing", f"\n{trap}from typing".encode(), 1)
        assert trap.encode() in code
        ada.upload_file(path_or_fileobj=code, path_in_repo=name, repo_id="ada/untrusted")
    assert "trust_remote_code" in stranger.run(load_without_trust, "ada/untrusted", tmp_path / "stranger")
    assert client.run(load_with_package, "ada/untrusted", tmp_path / "owner").startswith("aselect_hf.")
    assert not (tmp_path / "sprung").exists()
    stranger.run(features, "ada/untrusted", tmp_path / "trusting")
    assert (tmp_path / "sprung").exists(), "the trap works"
