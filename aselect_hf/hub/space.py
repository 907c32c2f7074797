"""A Space: the page of a pushed model, which the Hub runs.

Metadata is that of the Hub's reference of Spaces. A Space has the id of its model, in the Hub's own list of Spaces.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd
from huggingface_hub.utils import yaml_dump

from aselect_hf.hub.target import PushTarget
from aselect_hf.reporting.markdown import Markdown

TEMPLATES = Path(__file__).parent / "templates" / "space"
GRADIO = "6.31.0"
PYTHON = "3.12"
THUMBNAIL = "thumbnail.png"
MAX_DESCRIPTION = 60
"""Characters of `short_description` that the Hub accepts."""


def space_files(repo_id: str, license: Any = None) -> dict[str, bytes]:
    """The files of the Space for a model.

    Args:
        repo_id: of the model, as `user/name`.
        license: of the model, by its Hub identifier; a list gives none.
    """
    name = repo_id.rpartition("/")[2]
    metadata = {
        "title": name,
        "emoji": "🌫️",
        "colorFrom": "blue",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": PYTHON,
        "app_file": "app.py",
        "short_description": f"What noise does to the features of {name}"[:MAX_DESCRIPTION],
        "thumbnail": f"https://huggingface.co/spaces/{repo_id}/resolve/main/{THUMBNAIL}",
        "models": [repo_id],
        "preload_from_hub": [repo_id],
        **({"license": license} if isinstance(license, str) else {}),
    }
    body = (TEMPLATES / "README.md").read_text(encoding="utf-8")
    for word, text in {"name": Markdown.escape(name), "model": Markdown.escape(repo_id), "link": repo_id}.items():
        body = body.replace(f"{{{{ {word} }}}}", text)
    app = (TEMPLATES / "app.py").read_text(encoding="utf-8")
    texts = {
        "README.md": f"---\n{yaml_dump(metadata)}---\n\n{body}",
        "app.py": app.replace('"{{ repo_id }}"', json.dumps(repo_id)),
        "requirements.txt": f"aselect-hf[app]=={version('aselect-hf')}\n",
    }
    picture = (TEMPLATES / THUMBNAIL).read_bytes()
    return {path: text.encode() for path, text in texts.items()} | {THUMBNAIL: picture}


def push_space(place: PushTarget, license: Any = None) -> CommitInfo:
    """Create or update the Space of the model that was pushed to `place`, in one commit; other files in it are kept.

    Raises:
        PushError: the Hub refused, or the connection broke.
    """
    with place.errors(f"the model was pushed, but its Space {place.repo_id} was not"):
        place.api.create_repo(
            place.repo_id, repo_type="space", space_sdk="gradio", private=place.private, exist_ok=True
        )
        files = space_files(place.repo_id, license)
        return place.api.create_commit(
            place.repo_id,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message="Push page with aselect-hf",
            repo_type="space",
        )
