"""Run transformers' own common test mixins on the classes of this package.

    python -m tests.conformance.run [--cache FOLDER] [pytest arguments]

The mixins ship in the source distribution of transformers, not in its wheel: the one of the installed version is
downloaded once into the cache folder. Its few files that matter are laid out in a temporary folder as they are in
transformers' repository, with stubs for the helpers that the distribution leaves out, and `modules/` beside them as
`tests/models/aselect_dit/`; pytest runs there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = Path(__file__).parent / "modules"
TARGET = Path("tests/models/aselect_dit")

MIXINS = (
    "tests/test_modeling_common.py",
    "tests/test_backbone_common.py",
    "tests/test_configuration_common.py",
    "tests/test_image_processing_common.py",
)

STUBS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "tests/models/__init__.py": "",
    "tests/models/aselect_dit/__init__.py": "",
    "tests/utils/__init__.py": "",
    # A value other than the default for each field that all configurations share.
    "tests/utils/test_configuration_utils.py": """\
config_common_kwargs = {
    "output_hidden_states": True,
    "return_dict": False,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["AnyModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
""",
    # Maps the addresses of test images to local copies; offline, the tests that read one are skipped.
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url): return url\n",
    "pytest.ini": """\
[pytest]
filterwarnings =
    ignore::DeprecationWarning
    ignore::FutureWarning
    ignore::pytest.PytestUnknownMarkWarning
""",
}
"""What the kept files import and the source distribution leaves out."""


def default_cache() -> Path:
    """`aselect-hf` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aselect-hf"


def fetch_sdist(version: str, cache: Path) -> Path:
    """The source distribution of transformers `version`, downloaded with pip unless the cache has it.

    Raises:
        RuntimeError: pip could not download it.
    """
    archive = cache / f"transformers-{version}.tar.gz"
    if archive.exists():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={version}"]
        if subprocess.run(command, check=False).returncode:
            raise RuntimeError(
                f"pip could not download the source distribution of transformers {version} (its output is above); "
                f"without a network, or for a version that was never released, put it at {archive}"
            )
        (Path(folder) / archive.name).replace(archive)
    return archive


def arrange(archive: Path, folder: Path) -> None:
    """Lay out the mixins of `archive`, the stubs and our test modules in `folder`.

    Raises:
        RuntimeError: this version of transformers keeps its mixins elsewhere.
    """
    with tarfile.open(archive) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist}
        missing = [name for name in MIXINS if name not in members]
        if missing:
            raise RuntimeError(f"{archive.name} holds no {', '.join(missing)}: adapt MIXINS in {__file__}")
        files = {name: sdist.extractfile(members[name]) for name in MIXINS}
        contents = {name: file.read() for name, file in files.items() if file}
    contents |= {name: source.encode() for name, source in STUBS.items()}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for module in MODULES.glob("*.py"):
        shutil.copy(module, folder / TARGET)


def run_pytest(folder: Path, arguments: list[str]) -> int:
    """Run pytest in `folder`, on this checkout's package and without the Hub; returns its exit status."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TARGET), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Run transformers' common test mixins on the classes of aselect_hf.")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="keeps the download (default: %(default)s)")
    options, arguments = parser.parse_known_args()
    archive = fetch_sdist(importlib.metadata.version("transformers"), options.cache.absolute())
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        arrange(archive, Path(folder))
        return run_pytest(Path(folder), arguments)


if __name__ == "__main__":
    sys.exit(main())
