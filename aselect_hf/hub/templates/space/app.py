"""The page of a model on the Hub: predict, walk the noise, compare.

It runs by itself: `pip install -r requirements.txt`, then `python app.py`.
"""

try:  # before torch; only Spaces with a borrowed GPU (ZeroGPU) have it
    import spaces
except ImportError:
    spaces = None
import os

import torch

from aselect_hf.app import Workbench, load_shown
from aselect_hf.app.server import serve

MODEL = "{{ repo_id }}"

bench = Workbench([load_shown(MODEL, "cuda" if torch.cuda.is_available() else "cpu")])
if spaces is not None:
    bench.borrow(spaces.GPU)  # without effect where the Space has hardware of its own

if __name__ == "__main__":
    serve(bench, host="0.0.0.0", port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")), block=True)
