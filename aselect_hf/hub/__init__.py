"""Publishing: the files of an upload, the model card, and the push."""

from aselect_hf.hub.push import push_folder, push_to_hub
from aselect_hf.hub.results import EvaluationResult
from aselect_hf.hub.target import PushError, PushTarget

__all__ = ["EvaluationResult", "PushError", "PushTarget", "push_folder", "push_to_hub"]
