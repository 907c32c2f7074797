"""Saved folders carry all their code: every class loads with `trust_remote_code=True` where this package is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import aselect_hf
from aselect_hf import (
    ASelectDiTBackbone,
    ASelectDiTForImageClassification,
    ASelectDiTForSemanticSegmentation,
    ASelectDiTModel,
    make_image_processor,
)
from aselect_hf.conversion import save_model
from aselect_hf.data.sources import SAMPLE_MODEL
from aselect_hf.modeling.configuration_aselect_dit import AUTO_MAP

MODELING = Path(aselect_hf.__file__).parent / "modeling"
CLASSES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "model": (ASelectDiTModel, "AutoModel", {}),
    "classification": (
        ASelectDiTForImageClassification,
        "AutoModelForImageClassification",
        {"pooling": "attentive", "head_features": ["blocks.0.query", "blocks.1.key"]},
    ),
    "segmentation": (
        ASelectDiTForSemanticSegmentation,
        "AutoModelForSemanticSegmentation",
        {"segmentation_head": "upernet", "segmentation_head_channels": 16},
    ),
}
OUTPUT = {"model": "pooler_output", "classification": "logits", "segmentation": "logits"}

LOAD = """
import transformers
folder, auto_class, output, images = sys.argv[2:]
images = torch.tensor(json.loads(images))
auto = getattr(transformers, auto_class)
model = auto.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(folder + "-again")
again = auto.from_pretrained(folder + "-again", trust_remote_code=True)
report({
    "numbers": model(images)[output].tolist(),
    "again": again(images)[output].tolist(),
    "module": type(model).__module__,
    "timestep": model.config.timestep,
    "package": "aselect_hf" in sys.modules,
    "diffusers": "diffusers" in sys.modules,
})
"""


@pytest.fixture
def build(make_config: Any, randomize: Any) -> Callable[..., Any]:
    """`build(task, **config)`: one of `CLASSES` with random weights."""

    def build(task: str, **config: Any) -> Any:
        model_class, _, options = CLASSES[task]
        return randomize(model_class(make_config(num_labels=4, **options, **config)))

    return build


@pytest.mark.parametrize("task", CLASSES)
def test_a_folder_loads_without_the_package(
    build: Any, normal: Any, tmp_path: Path, run_elsewhere: Any, task: str
) -> None:
    model, images = build(task), normal(2, 2, 8, 8)
    model.save_pretrained(tmp_path / "model")
    found = run_elsewhere(
        LOAD,
        str(tmp_path / "model"),
        CLASSES[task][1],
        OUTPUT[task],
        json.dumps(images.tolist()),
        blocked=("aselect_hf", "diffusers"),
    )
    with torch.no_grad():
        expected = model(images)[OUTPUT[task]]
    torch.testing.assert_close(torch.tensor(found["numbers"]), expected, rtol=0, atol=1e-6)
    assert found["again"] == found["numbers"]
    assert found["module"].startswith("transformers_modules.")
    assert found["timestep"] == 100
    assert not found["package"]
    assert not found["diffusers"]
    saved_again = {path.name: path.read_text() for path in Path(f"{tmp_path / 'model'}-again").glob("*.py")}
    assert saved_again == {path.name: path.read_text() for path in (tmp_path / "model").glob("*.py")}


@pytest.mark.parametrize("task", CLASSES)
def test_a_fixed_timestep_loads_without_the_package(
    build: Any, normal: Any, tmp_path: Path, run_elsewhere: Any, task: str
) -> None:
    """The plain ViT of `fix_timestep` is the same classes, and its folder as whole."""
    whole, images = build(task, num_noise_draws=2), normal(2, 2, 8, 8)
    whole.fix_timestep(70).save_pretrained(tmp_path / "model")
    arguments = (str(tmp_path / "model"), CLASSES[task][1], OUTPUT[task], json.dumps(images.tolist()))
    found = run_elsewhere(LOAD, *arguments, blocked=("aselect_hf", "diffusers"))
    whole.config.timestep = 70
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["numbers"]), whole(images)[OUTPUT[task]], rtol=1e-5, atol=1e-5)
    assert found["again"] == found["numbers"]
    assert found["timestep"] == 70


def test_a_folder_with_a_vae_needs_diffusers_only(
    make_config: Any, randomize: Any, tiny_kl: Any, normal: Any, tmp_path: Path, run_elsewhere: Any
) -> None:
    fields = {key: value for key, value in dict(tiny_kl.config).items() if not key.startswith("_")}
    config = make_config(
        vae_config={"_class_name": "AutoencoderKL"} | json.loads(json.dumps(fields)), num_channels=4, num_labels=3
    )
    model, images = randomize(ASelectDiTForImageClassification(config)), normal(1, 3, 16, 16)
    model.save_pretrained(tmp_path / "model")
    arguments = (str(tmp_path / "model"), "AutoModelForImageClassification", "logits", json.dumps(images.tolist()))
    found = run_elsewhere(LOAD, *arguments)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["numbers"]), model(images).logits, rtol=1e-5, atol=1e-5)


def test_every_class_of_the_map_loads_from_any_folder(
    make_model: Any, normal: Any, tmp_path: Path, run_elsewhere: Any
) -> None:
    """One folder serves all tasks: a plain checkpoint becomes a classifier, a segmenter or a backbone."""
    plain, images = make_model(), normal(1, 2, 8, 8)
    plain.save_pretrained(tmp_path / "model")
    script = """
        import transformers
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        folder, images = sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        shapes = {}
        for auto_class, reference in config.auto_map.items():
            if auto_class == "AutoConfig":
                continue
            if auto_class == "AutoBackbone":  # its own from_pretrained takes repositories only
                model_class = get_class_from_dynamic_module(reference, folder)
                model = model_class.from_pretrained(folder, out_indices=[1, 2])
            else:
                model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
            output = model(images)
            shapes[type(model).__name__] = list(getattr(output, "feature_maps", output.to_tuple())[0].shape)
        report(shapes)
    """
    assert run_elsewhere(script, str(tmp_path / "model"), json.dumps(images.tolist())) == {
        "ASelectDiTModel": [1, 16, 24],
        "ASelectDiTBackbone": [1, 24, 4, 4],
        "ASelectDiTForImageClassification": [1, 2],
        "ASelectDiTForSemanticSegmentation": [1, 2, 4, 4],
    }


def test_the_code_is_whole_and_flat(build: Any, tmp_path: Path) -> None:
    build("classification").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    copied = {path.name for path in tmp_path.glob("*.py")}
    assert {f"{reference.partition('.')[0]}.py" for reference in AUTO_MAP.values()} <= copied
    for name in copied:
        assert (tmp_path / name).read_text() == (MODELING / name).read_text()
        assert "import aselect_hf" not in (tmp_path / name).read_text()
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_nothing_runs_without_trust(build: Any, tmp_path: Path, run_elsewhere: Any) -> None:
    build("classification").save_pretrained(tmp_path / "model")
    marker = tmp_path / "ran"
    with (tmp_path / "model" / "configuration_aselect_dit.py").open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'w').close()\n")
    script = """
        import transformers
        try:
            transformers.AutoModelForImageClassification.from_pretrained(sys.argv[2])
        except (ValueError, OSError, EOFError) as error:
            report(str(error))
    """
    assert "trust_remote_code" in run_elsewhere(script, str(tmp_path / "model"))
    assert not marker.exists()


def test_with_the_package_no_trust_is_needed(build: Any, normal: Any, tmp_path: Path, run_elsewhere: Any) -> None:
    model, images = build("classification"), normal(1, 2, 8, 8)
    model.save_pretrained(tmp_path / "model")
    script = """
        import aselect_hf, transformers
        model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[2])
        report([type(model).__module__, model(torch.tensor(json.loads(sys.argv[3]))).logits.tolist()])
    """
    module, logits = run_elsewhere(script, str(tmp_path / "model"), json.dumps(images.tolist()), blocked=())
    assert module == "aselect_hf.modeling.modeling_aselect_dit_heads"
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(images).logits, rtol=0, atol=1e-6)


def test_image_processors_load_without_the_package(
    make_config: Any, randomize: Any, tmp_path: Path, run_elsewhere: Any
) -> None:
    image = Image.linear_gradient("L").resize((20, 12)).convert("RGB")
    image.save(tmp_path / "image.png")
    expected = {}
    for channels in (1, 3):
        for model_class in (ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation):
            folder = tmp_path / f"{model_class.__name__}-{channels}"
            save_model(randomize(model_class(make_config(num_channels=channels))), folder)
            whole_image = model_class is ASelectDiTForSemanticSegmentation
            processor = make_image_processor(make_config(num_channels=channels), whole_image=whole_image)
            expected[str(folder)] = processor(image, return_tensors="pt").pixel_values
    script = """
        import transformers
        from PIL import Image
        found = {}
        for folder in sys.argv[3:]:
            processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
            pixels = processor(Image.open(sys.argv[2]), return_tensors="pt").pixel_values
            found[folder] = pixels.tolist(), hasattr(processor, "post_process_semantic_segmentation")
        report(found)
    """
    found = run_elsewhere(script, str(tmp_path / "image.png"), *expected)
    for folder, (pixels, post_process) in found.items():
        assert torch.equal(torch.tensor(pixels), expected[folder])
        assert post_process or "Segmentation" not in folder


def test_a_backbone_is_saved_with_its_code(make_config: Any, tmp_path: Path) -> None:
    ASelectDiTBackbone(make_config(out_indices=[1])).save_pretrained(tmp_path)
    assert (tmp_path / "backbone_aselect_dit.py").is_file()


def test_the_shipped_model_carries_its_code(tmp_path: Path, run_elsewhere: Any) -> None:
    """Code and auto_map lie beside its weights; what every script does first, `convert("RGB")`, changes nothing."""
    for path in sorted(MODELING.glob("[!_]*.py")):
        assert (SAMPLE_MODEL / path.name).read_text() == path.read_text()
    assert json.loads((SAMPLE_MODEL / "config.json").read_text())["auto_map"] == AUTO_MAP
    image = Image.linear_gradient("L").resize((28, 28))
    image.save(tmp_path / "image.png")
    script = """
        import transformers
        from PIL import Image
        processor = transformers.AutoImageProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)
        model = transformers.AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True)
        pixels = [
            processor(image, return_tensors="pt").pixel_values
            for image in (Image.open(sys.argv[3]), Image.open(sys.argv[3]).convert("RGB"))
        ]
        assert torch.equal(*pixels)
        report([pixels[0].tolist(), model(pixels[0]).pooler_output.tolist()])
    """
    pixels, pooled = run_elsewhere(script, str(SAMPLE_MODEL), str(tmp_path / "image.png"))
    expected = torch.from_numpy(np.asarray(image) / np.float32(127.5) - 1)
    torch.testing.assert_close(torch.tensor(pixels)[0, 0], expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        here = ASelectDiTModel.from_pretrained(SAMPLE_MODEL)(torch.tensor(pixels)).pooler_output
    torch.testing.assert_close(torch.tensor(pooled), here, rtol=1e-5, atol=1e-5)


def test_from_diffusers_says_that_it_needs_the_package(build: Any, tmp_path: Path, run_elsewhere: Any) -> None:
    build("model").save_pretrained(tmp_path / "model")
    script = """
        import transformers
        model = transformers.AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True)
        try:
            type(model).from_diffusers("facebook/DiT-XL-2-256")
        except ImportError as error:
            report(str(error))
    """
    assert "pip install aselect-hf" in run_elsewhere(script, str(tmp_path / "model"))
