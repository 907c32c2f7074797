"""Plain encoders under the probe: what is read of them equals their own forward pass, and bad names are refused."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BeitConfig,
    BeitImageProcessorPil,
    BeitModel,
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViltConfig,
    ViltModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from aselect_hf.compare import compare_strategies
from aselect_hf.compare.baselines import Baseline
from aselect_hf.compare.table import Comparison
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = SIZE | {"image_size": 32, "patch_size": 8}
BOTH = "class token and mean of the patch tokens"
PROCESSOR = {"size": {"height": 32, "width": 32}}
SQUARE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def clip() -> CLIPModel:
    text = SIZE | {"vocab_size": 20}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VIT, projection_dim=8))


ENCODERS = {
    "vit": (lambda: ViTModel(ViTConfig(**VIT)), ViTImageProcessorPil(**PROCESSOR), BOTH, 32),
    "dinov2": (
        lambda: Dinov2Model(Dinov2Config(**{k: v for k, v in VIT.items() if k != "intermediate_size"})),
        BitImageProcessorPil(**SQUARE), BOTH, 32,
    ),
    "resnet": (
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
        ViTImageProcessorPil(**PROCESSOR), "mean of the last feature map", 16,
    ),
    "clip": (clip, CLIPImageProcessorPil(**SQUARE), BOTH, 32),
    "clip vision": (lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)), CLIPImageProcessorPil(**SQUARE), BOTH, 32),
    "beit": (lambda: BeitModel(BeitConfig(**VIT)), BeitImageProcessorPil(**PROCESSOR), BOTH, 32),
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """`saved(name)`: the folder of a random encoder, and the network."""

    def save(name: str):
        torch.manual_seed(0)
        build, processor, *_ = ENCODERS[name]
        model = build().eval()
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return save


@pytest.fixture
def pictures() -> ImageData:
    """Gray and color images of two sizes."""
    rng = np.random.default_rng(0)
    shapes = [(40, 40, 3), (40, 40), (24, 36, 3)]
    return ImageData([Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes])


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_those_of_the_network_itself(saved, pictures, name):
    folder, model = saved(name)
    processor, reads, width = ENCODERS[name][1:]
    baseline = Baseline(str(folder))
    assert baseline.reads == reads
    found = baseline.features(pictures, progress=False)
    assert found.shape == (3, width)
    images = [pictures.decode(index).convert("RGB") for index in range(3)]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = (model.vision_model if name == "clip" else model)(pixel_values=pixels).last_hidden_state
    expected = tokens.mean(dim=(2, 3)) if tokens.ndim == 4 else torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    row = baseline.row(pictures.decode(0), 0.5, [0.5])
    assert (row.width, row.revision) == (width, None)
    assert row.flops > 0
    assert row.parameters > 0


def test_a_classifier_is_read_without_its_head(saved, tmp_path, pictures):
    """Its checkpoint has no pooling layer, which is not read, so that nothing is random."""
    torch.manual_seed(1)
    classifier = ViTForImageClassification(ViTConfig(**VIT)).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    ENCODERS["vit"][1].save_pretrained(tmp_path / "classifier")
    one, two = (Baseline(str(tmp_path / "classifier")).features(pictures, progress=False) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_a_masked_autoencoder_sees_whole_images(saved, tmp_path, pictures):
    """By default it drops three quarters of the patches at random, also in evaluation mode."""
    torch.manual_seed(0)
    model = ViTMAEModel(ViTMAEConfig(**VIT)).eval()
    model.save_pretrained(tmp_path / "mae")
    ENCODERS["vit"][1].save_pretrained(tmp_path / "mae")
    baseline = Baseline(str(tmp_path / "mae"))
    assert baseline.reads == BOTH
    state = torch.get_rng_state()
    one, two = (baseline.features(pictures, progress=False) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    model.config.mask_ratio = 0.0
    images = [pictures.decode(index).convert("RGB") for index in range(3)]
    pixels = ENCODERS["vit"][1](images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = model(pixel_values=pixels).last_hidden_state
    np.testing.assert_allclose(one, torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), atol=1e-5)


def test_features_are_read_from_the_cache_when_they_are_there(saved, pictures, tmp_path, monkeypatch):
    folder, _ = saved("vit")
    baseline = Baseline(str(folder))
    found = baseline.cached_features(pictures, cache_dir=tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(found, baseline.features(pictures, progress=False))
    again = Baseline(str(folder))
    monkeypatch.setattr(again, "_forward", None)
    np.testing.assert_array_equal(again.cached_features(pictures, cache_dir=tmp_path / "cache", progress=False), found)
    other = pictures.subset([0, 1])
    with pytest.raises(ValueError, match="cannot encode an image"):
        again.cached_features(other, cache_dir=tmp_path / "cache", progress=False)


def test_images_may_keep_their_shape(saved, pictures):
    """A processor that does not crop gives images of several sizes: a convolutional network reads each on its own."""
    folder, model = saved("resnet")
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    processor.save_pretrained(folder)
    found = Baseline(str(folder)).features(pictures, progress=False)
    pixels = processor(images=pictures.decode(2), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 48)
    with torch.no_grad():
        np.testing.assert_allclose(found[2:], model(pixels).last_hidden_state.mean(dim=(2, 3)), atol=1e-5)
    vit, _ = saved("vit")
    processor.save_pretrained(vit)
    with pytest.raises(ValueError, match=r"baseline .*vit' cannot encode an image: Input image size \(32\*48\)"):
        Baseline(str(vit)).features(pictures, progress=False)


def test_maps_with_channels_last_are_averaged_over_space(saved, pictures, monkeypatch):
    folder, _ = saved("resnet")
    expected = Baseline(str(folder)).features(pictures, progress=False)
    original = ResNetModel.forward

    def channels_last(self, pixel_values, **options):
        output = original(self, pixel_values, **options)
        output.last_hidden_state = output.last_hidden_state.permute(0, 2, 3, 1)
        return output

    monkeypatch.setattr(ResNetModel, "forward", channels_last)
    np.testing.assert_allclose(Baseline(str(folder)).features(pictures, progress=False), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ViTModel(ViTConfig(**VIT, num_channels=1)), "cannot encode an image: .* Expected 1 but got 3"),
        (lambda: ViTModel(ViTConfig(**VIT | {"image_size": 64})), r"cannot encode an image: Input image size \(32\*32"),
        (lambda: VideoMAEModel(VideoMAEConfig(**VIT, num_frames=2)), "cannot encode an image: not enough values"),
        (lambda: ViltModel(ViltConfig(**VIT, vocab_size=20)), "not an encoder of images alone: it reads input_ids"),
    ],
)
def test_what_cannot_encode_a_color_image_is_refused(tmp_path, build, message):
    build().save_pretrained(tmp_path)
    ENCODERS["vit"][1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Baseline(str(tmp_path))


def test_random_features_are_refused(saved, monkeypatch):
    original = ViTModel.forward

    def noisy(self, pixel_values, **options):
        return original(self, pixel_values + torch.randn_like(pixel_values), **options)

    noisy.__signature__ = inspect.signature(original)
    monkeypatch.setattr(ViTModel, "forward", noisy)
    with pytest.raises(ValueError, match="is random: two runs on the same image give other features"):
        Baseline(str(saved("vit")[0]))


def test_missing_weights_are_refused(saved, tmp_path):
    folder, model = saved("vit")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" not in name}
    state = {name: tensor for name, tensor in state.items() if "layer.1" not in name}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks .* weights of ViTModel, such as .*: its features would be random"):
        Baseline(str(folder))


def test_what_is_not_a_vision_encoder_is_refused(tmp_path, saved, make_model):
    BertModel(BertConfig(**SIZE, vocab_size=20)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="not a vision model: its type is 'bert'"):
        Baseline(str(tmp_path / "text"))
    make_model().save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match="is a diffusion backbone"):
        Baseline(str(tmp_path / "dit"))
    folder, _ = saved("vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="cannot load an image processor"):
        Baseline(str(folder))
    with pytest.raises(ValueError, match="'nobody/nothing': cannot load a config"):
        Baseline("nobody/nothing")
    with pytest.raises(ValueError, match="gray or color images, got tensors of 2 channels"):
        Baseline(str(saved("vit")[0])).features(ImageData(torch.zeros(3, 2, 8, 8)), progress=False)


def test_a_comparison_with_baselines(saved, tmp_path):
    model = load_model("sample")
    splits = {name: ImageData.of(load_images("sample", name)) for name in ("train", "validation", "test")}
    splits = {name: data.sample(60, 0, per_class=1) for name, data in splits.items()}
    folder, _ = saved("vit")
    options = {"timesteps": [50, 400], "num_images": 8, "num_seeds": 2, "cache_dir": tmp_path, "progress": False}
    twice = [str(folder)] * 2  # runs once
    found = compare_strategies(model, splits, strategies=["hfr"], baselines=twice, **options)
    backbone, baseline = found.encoders
    assert backbone.test_accuracies == found.rows[0].test_accuracies
    assert (baseline.name, len(baseline.test_accuracies)) == (str(folder), 2)
    out = found.save(tmp_path / "out")
    loaded = Comparison.load(out / "compare.json")
    assert loaded.encoders == found.encoders
    assert f" | {BOTH} | " in (out / "compare.md").read_text()
    assert found.better_baselines() == []  # random weights
    baseline.test_accuracies = [0.99, 0.99]
    (sentence,) = found.better_baselines()
    assert "points more with" in sentence
    assert sentence in found.markdown()
