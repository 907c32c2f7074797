"""Publishing: what is uploaded, the model card that tells its story, and the push itself."""

from aselect_hf.hub.push import push_folder, push_to_hub
from aselect_hf.hub.results import EvaluationResult
from aselect_hf.hub.target import PushError, PushTarget

__all__ = ["EvaluationResult", "PushError", "PushTarget", "push_folder", "push_to_hub"]
