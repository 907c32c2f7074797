"""What `test_sharing` launches under torchrun: sweeps and features that are shared, and a process that is lost.

torchrun --nproc_per_node 2 -m tests.processes.two_processes FOLDER
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from aselect_hf import ASelectDiTConfig, ASelectDiTModel, select_timestep
from aselect_hf.data import feature_cache, processes
from aselect_hf.data.feature_set import write_feature_set
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.processes import join_processes, shared_work
from aselect_hf.selection import streamed_ridge, streaming

COUNT, BATCH = 45, 4
REQUESTS: dict[str, dict[str, Any]] = {
    "hfr": {"num_images": COUNT},
    "hfr race": {"num_images": COUNT, "early_stopping": 0.2, "search": "coarse_to_fine"},
    "hfr standardized": {"num_images": 10, "standardize": True},
    "hfr_authors": {"num_images": 9},
    "ridge": {"num_images": COUNT},
    "icr": {"num_images": 20},
    "snr": {"num_images": 3},  # a single batch: one process has nothing to do
    "grid": {},
    "rankme streamed": {"num_images": COUNT},
    "ridge streamed": {"num_images": COUNT},
    "grid streamed": {"probe": "ridge"},
}


def tiny_model() -> ASelectDiTModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2, "patch_size": 2}
    model = ASelectDiTModel(ASelectDiTConfig(**shape, sample_size=8, num_channels=1, num_condition_classes=0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images() -> ImageData:
    labels = torch.arange(COUNT) % 3
    pixels = torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + labels.view(-1, 1, 1, 1) / 3 - 1
    return ImageData(pixels, labels=labels.tolist(), name="noise")


def work(folder: Path) -> dict[str, dict[str, Any]]:
    """Selections by name, and a feature set in the folder."""
    torch.set_num_threads(1)
    feature_cache.SHARD_IMAGES = 8
    model, data, found = tiny_model(), images(), {}
    shared = {"timesteps": 6, "batch_size": BATCH, "cache_dir": folder / "cache", "progress": False}
    for name, request in REQUESTS.items():
        few = {"side_effect": lambda *args: False} if name.endswith("streamed") else {"wraps": streaming.are_few}
        with patch.object(streaming, "are_few", **few), patch.object(streamed_ridge, "are_few", **few):
            selection = select_timestep(model, data, method=name.split()[0], **shared, **request)
        found[name] = dataclasses.asdict(selection)
    write_feature_set(model, data, folder / "features", num_shards=5, batch_size=BATCH, progress=False)
    return found


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(150, exit=True)
    join_processes()
    runs, forward = [], ASelectDiTModel.features_of_noisy

    def count(self: Any, noisy: torch.Tensor, *args: Any, **options: Any) -> Any:
        runs.append(len(noisy))
        return forward(self, noisy, *args, **options)

    ASelectDiTModel.features_of_noisy = count
    with shared_work() as here:
        found: dict[str, Any] = {"selections": work(folder), "runs": sum(runs)}
        processes.SILENCE_SECONDS, processes.BEAT_SECONDS = 2.0, 0.2
        time.sleep(6)  # the next sign of life follows the shorter rhythm
        if here.index == 1:
            time.sleep(5)  # long, but alive
        found["slow"] = here.gather(here.index)
        if here.index == 0:
            started = time.monotonic()
            try:
                here.gather(None)
            except TimeoutError as error:
                found["lost"] = [str(error), time.monotonic() - started]
        (folder / f"{here.index}.json").write_text(json.dumps(found))
        os._exit(0)  # without a goodbye: the first process finds out by itself


if __name__ == "__main__":
    main(Path(sys.argv[1]))
