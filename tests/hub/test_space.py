"""A Space is pushed beside the model, and starts from its own folder alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from huggingface_hub import snapshot_download
from PIL import Image

from aselect_hf.hub.space import space_files

from .conftest import ClientProcess
from .server import HubServer
from .test_push import push_command, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pushed(hub: HubServer, client: ClientProcess, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    client.run(save_model, folder, 0)
    code, printed = client.run(push_command, str(folder), "ada/tiny", "--space", "--accept-base-license")
    assert code == 0, printed
    assert "its Space spaces/ada/tiny" in printed
    return "ada/tiny"


@pytest.fixture
def folder(hub: HubServer, client: ClientProcess, pushed: str, tmp_path: Path) -> Path:
    """The Space's folder, as the Hub would check it out."""
    client.run(snapshot_download, pushed, repo_type="space", local_dir=tmp_path / "space")
    return tmp_path / "space"


def metadata_of(readme: str) -> dict:
    return yaml.safe_load(readme.split("---\n")[1])


def test_the_hub_reads_its_metadata(folder):
    readme = (folder / "README.md").read_text(encoding="utf-8")
    found = metadata_of(readme)
    assert found.items() >= {
        "sdk": "gradio", "python_version": "3.12", "app_file": "app.py", "models": ["ada/tiny"],
        "preload_from_hub": ["ada/tiny"], "license": "cc-by-nc-4.0",
    }.items()  # fmt: skip
    assert re.fullmatch(r"6\.\d+\.\d+", found["sdk_version"])
    assert len(found["short_description"]) <= 60
    assert found["thumbnail"] == "https://huggingface.co/spaces/ada/tiny/resolve/main/thumbnail.png"
    with Image.open(folder / "thumbnail.png") as thumbnail:
        assert thumbnail.format == "PNG"
    assert "https://huggingface.co/ada/tiny" in readme
    assert re.fullmatch(r"aselect-hf\[app\]==\S+\n", (folder / "requirements.txt").read_text())


def test_the_versions_are_those_that_the_tests_run(folder):
    pins = (ROOT / "constraints.txt").read_text()
    assert f"gradio=={metadata_of((folder / 'README.md').read_text(encoding='utf-8'))['sdk_version']}\n" in pins


def test_the_card_links_it(hub, client, pushed, ada, tmp_path):
    card = Path(ada.hf_hub_download(pushed, "README.md", local_dir=tmp_path)).read_text(encoding="utf-8")
    assert "https://huggingface.co/spaces/ada/tiny" in card


def test_a_second_push_keeps_what_people_added(client, pushed, ada, tmp_path):
    ada.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=pushed, repo_type="space")
    client.run(save_model, tmp_path / "model", 1)
    assert client.run(push_command, str(tmp_path / "model"), "ada/tiny", "--space", "--accept-base-license")[0] == 0
    assert "notes.txt" in ada.list_repo_files(pushed, repo_type="space")


def test_a_pull_request_has_no_space(client, tmp_path):
    client.run(save_model, tmp_path / "model", 1)
    code, printed = client.run(
        push_command, str(tmp_path / "model"), "ada/tiny", "--space", "--create-pr", "--accept-base-license"
    )
    assert (code, "space and create_pr cannot be combined" in printed) == (2, True)


def test_a_dry_run_lists_its_files(client, tmp_path):
    client.run(save_model, tmp_path / "model", 1)
    code, printed = client.run(push_command, str(tmp_path / "model"), "ada/other", "--space", "--dry-run")
    assert (code, "spaces: app.py" in printed) == (0, True)


def test_names_are_text_in_its_files():
    files = space_files('ada/a"b')
    compile(files["app.py"], "app.py", "exec")
    assert metadata_of(files["README.md"].decode())["models"] == ['ada/a"b']


def answers(hub: HubServer, python: str | Path, folder: Path, home: Path, **variables: str) -> set[str]:
    """Names of the functions that programs can call at the page which `python app.py` serves in the folder."""
    environment = os.environ | hub.client_environment(home) | {"HF_HUB_OFFLINE": "0", "GRADIO_SERVER_PORT": "7897"}
    environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"} | variables
    server = subprocess.Popen([python, "app.py"], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert any(":7897" in line for line in server.stdout)
        with urlopen("http://127.0.0.1:7897/gradio_api/info") as reply:
            return set(json.load(reply)["named_endpoints"])
    finally:
        server.terminate()
        server.wait()


@pytest.mark.app
@pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra app")
def test_it_starts_from_its_folder(hub, folder, tmp_path):
    """In a process of its own that knows the Hub and the folder, and on the port that the Hub names."""
    found = answers(hub, sys.executable, folder, tmp_path / "home", PYTHONPATH=str(ROOT))
    assert {"/walk", "/predict"} <= found


def install(python: str | Path, *arguments: str) -> None:
    """Run pip; skip the test where it cannot install.

    `-I` keeps the checkout off pip's path, where it would find this package and leave it out.
    """
    command = [python, "-I", "-m", "pip", "--quiet", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install: {done.stderr[-500:]}")


@pytest.mark.slow
def test_it_starts_in_an_environment_of_its_own(hub, folder, tmp_path):
    """As the Hub builds it: its requirements, in which a wheel stands for the release of this package."""
    install(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(tmp_path / "wheels"), str(ROOT))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install(
        python, "install", "--find-links", str(tmp_path / "wheels"), "--constraint", str(ROOT / "constraints.txt"),
        "--requirement", str(folder / "requirements.txt"),
    )  # fmt: skip
    assert {"/walk", "/predict"} <= answers(hub, python, folder, tmp_path / "home")
