"""Publishing: what is uploaded, the model card that tells its story, and the push itself."""

from aselect_hf.hub.push import PushError, push_folder, push_to_hub
from aselect_hf.hub.results import EvaluationResult

__all__ = ["EvaluationResult", "PushError", "push_folder", "push_to_hub"]
