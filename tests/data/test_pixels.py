"""One way from any image to pixels: in the library, the saved image processor, pipelines and the endpoint handler."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, pipeline
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import aselect_hf.hub
from aselect_hf import ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation, ASelectDiTModel
from aselect_hf.conversion import save_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.images import image_pixels, read_image
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor
from aselect_hf.modeling.pixels import eight_bit_image

from .pictures import png

HANDLER = Path(aselect_hf.hub.__file__).parent / "templates" / "handler.py"
GENERATOR = np.random.default_rng(0)
COLORS = GENERATOR.integers(0, 256, (20, 12, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (20, 12), dtype=np.uint8)
GREY[0, :2] = 0, 255


def grey_forms() -> dict[str, Any]:
    """One gray image as every type that can hold it."""
    wide = GREY.astype(np.uint16) * 257
    alpha = np.full_like(GREY, 255)
    return {
        "L": Image.fromarray(GREY),
        "I;16": Image.fromarray(wide),
        "I;16B": Image.frombytes("I;16B", GREY.shape[::-1], wide.astype(">u2").tobytes()),
        "F": Image.fromarray((GREY / 255).astype(np.float32)),
        "P": Image.fromarray(GREY).convert("P"),
        "LA": Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)]),
        "RGB": Image.fromarray(GREY).convert("RGB"),
        "RGBA": Image.fromarray(GREY).convert("RGBA"),
        "uint8": GREY,
        "uint16": wide,
        "float32": (GREY / 255).astype(np.float32),
        "float64, channels last": np.repeat(GREY[..., None] / 255, 3, axis=-1),
        "channels first": np.repeat(GREY[None], 3, axis=0),
        "tensor": torch.from_numpy(GREY),
    }


@pytest.fixture(scope="module", params=[1, 3])
def config(request: pytest.FixtureRequest, make_config: Any) -> Any:
    return make_config(num_channels=request.param)


@pytest.mark.parametrize("form", grey_forms())
def test_one_image_is_the_same_pixels_in_every_type(config: Any, form: str) -> None:
    processor = make_image_processor(config)
    image = grey_forms()[form]
    pixels = processor(image, return_tensors="pt").pixel_values
    expected = processor(Image.fromarray(GREY), return_tensors="pt").pixel_values
    assert torch.equal(pixels, expected)
    if form != "tensor":
        assert torch.equal(image_pixels(config)([read_image(image, "x")]), expected)
    if form == "L":  # without resizing, these are the values themselves
        whole = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values[0, 0]
        np.testing.assert_allclose(whole, GREY / 127.5 - 1, atol=1e-6)


@given(st.binary(min_size=48, max_size=48), st.sampled_from(["png", "tiff"]))
def test_eight_and_sixteen_bits_are_the_same_image(content: bytes, kind: str) -> None:
    values = np.frombuffer(content, np.uint8).reshape(6, 8)
    decoded = []
    for array in (values, values.astype(np.uint16) * 257):
        file = io.BytesIO()
        Image.fromarray(array).save(file, kind)
        decoded.append(np.asarray(read_image(file.getvalue(), "x")))
    assert np.array_equal(decoded[0], values)
    assert np.array_equal(decoded[1], values)


@given(st.lists(st.integers(0, 65535), min_size=4, max_size=4))
def test_sixteen_bits_are_scaled_by_their_range(values: list[int]) -> None:
    pixels = np.asarray(eight_bit_image(np.array(values, np.uint16).reshape(2, 2)))
    assert np.abs(pixels.ravel() - np.array(values) / 257).max() <= 0.5


@pytest.mark.parametrize("mode", ["1", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "PA", "La", "RGBa"])
def test_colors_of_every_mode_are_read(mode: str) -> None:
    """As Pillow's own way back to RGB; what alpha hides is white."""
    if mode in ("La", "RGBa"):
        source = Image.fromarray(GREY).convert(mode[:-1] + "A")
        source.putalpha(255)
        expected = np.asarray(Image.fromarray(GREY).convert("RGB"))
        source = source.convert(mode)
    elif mode == "LAB":
        source = Image.new("LAB", (3, 2), (255, 128, 128))  # L* = 100
        expected = np.full((2, 3, 3), 255)
    else:
        source = (
            Image.fromarray(COLORS).convert("P").convert("PA")
            if mode == "PA"
            else Image.fromarray(COLORS).convert(mode)
        )
        expected = np.asarray(source.convert("RGB"))
    found = eight_bit_image(source)
    assert found.mode in ("L", "RGB")
    assert np.abs(np.asarray(found.convert("RGB")).astype(int) - expected).max() <= 1


def transparent_forms() -> dict[str, Image.Image]:
    """A black square whose left half is transparent, however that is written."""
    alpha = Image.new("L", (4, 4), 255)
    alpha.paste(0, (0, 0, 2, 4))
    black = Image.new("L", (4, 4), 0)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 0, 0, 0])
    palette.paste(0, (0, 0, 2, 4))
    palette.info["transparency"] = 0
    wide = Image.fromarray(np.where(np.arange(4) < 2, 77, 0).astype(np.uint16)[None].repeat(4, 0))
    wide.info["transparency"] = 77
    return {
        "LA": Image.merge("LA", [black, alpha]),
        "RGBA": Image.merge("RGBA", [black, black, black, alpha]),
        "P": palette,
        "I;16": wide,
    }


@pytest.mark.parametrize("form", transparent_forms())
def test_transparent_pixels_are_white(form: str) -> None:
    expected = np.where(np.arange(4) < 2, 255, 0)[None].repeat(4, 0)
    assert np.array_equal(np.asarray(eight_bit_image(transparent_forms()[form]).convert("L")), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(GREY.astype(np.int32) * 257), "int32 pixels in .* black and white are unknown"),
        (Image.fromarray(GREY.astype(np.float32)), "float32 pixels in 0..255, .* floats in 0..1"),
        (GREY.astype(np.int64), "int64 pixels in 0..255"),
        (GREY / 127.5 - 1, r"float64 pixels in -1..1"),
        (np.where(GREY[3, 3] == GREY, np.nan, GREY / 255), "NaN or infinite"),
        (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\)"),
        (np.zeros((8, 8), object), "object instead of numbers"),
    ],
)
def test_what_has_no_known_range_is_refused_by_name(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"image 1 of images.*{message}"):
        ImageData.of([Image.fromarray(GREY), image]).decode(1)
    with pytest.raises(ValueError, match="the image"):
        eight_bit_image(image)


def test_a_dark_sixteen_bit_image_is_said(caplog: pytest.LogCaptureFixture) -> None:
    eight_bit_image(GREY.astype(np.uint16) * 257)
    assert not caplog.messages
    eight_bit_image(GREY.astype(np.uint16))
    assert "less than a sixteenth" in caplog.text


def test_plain_rgb_is_what_transformers_own_processors_give(make_config: Any) -> None:
    options: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    square = {"height": 8, "width": 8}
    vit = ViTImageProcessorPil(size={"shortest_edge": 8}, crop_size=square, do_center_crop=True, **options)
    segformer = SegformerImageProcessorPil(size=square, do_center_crop=False, **options)
    config, labels = make_config(num_channels=3), GREY % 150
    for ours, theirs in ((make_image_processor(config), vit), (make_image_processor(config, True), segformer)):
        for images in (Image.fromarray(COLORS), [COLORS, COLORS[:9]], np.stack([COLORS] * 2)):
            found, expected = (each(images, return_tensors="pt").pixel_values for each in (ours, theirs))
            assert torch.equal(found, expected)
        raw = [each(COLORS, do_rescale=False, do_normalize=False).pixel_values[0] for each in (ours, theirs)]
        assert np.array_equal(*raw)
    for reduce in (False, True):
        found, expected = (
            each([COLORS], segmentation_maps=[labels.copy()], do_reduce_labels=reduce, return_tensors="pt")
            for each in (make_image_processor(config, True), segformer)
        )
        assert torch.equal(found.labels, expected.labels)


def test_maps_follow_a_cropped_image_too(config: Any) -> None:
    """The processor of a plain model, as `run_semantic_segmentation.py` uses it; more classes than a byte holds."""
    processor = make_image_processor(config)
    assert processor.do_reduce_labels is False
    classes = np.repeat(np.arange(20)[:, None] * 100, 12, axis=1)
    batch = processor([COLORS], segmentation_maps=[classes], return_tensors="pt")
    assert batch.labels.shape == batch.pixel_values.shape[:1] + batch.pixel_values.shape[2:]
    assert batch.labels.min() >= 200
    assert batch.labels.max() > 255


@pytest.mark.parametrize("channels", [1, 3])
def test_the_processor_is_that_of_the_models_task(make_config: Any, tmp_path: Path, channels: int) -> None:
    for model_class, whole in (
        (ASelectDiTModel, False),
        (ASelectDiTForImageClassification, False),
        (ASelectDiTForSemanticSegmentation, True),
    ):
        model = model_class(make_config(num_channels=channels))
        save_model(model, tmp_path)
        for config in (model.config, type(model.config).from_pretrained(tmp_path)):
            processor = make_image_processor(config)
            assert processor.do_center_crop is not whole
            assert processor.to_dict() == make_image_processor(config, whole_image=whole).to_dict()
            assert hasattr(processor, "post_process_semantic_segmentation")
            assert processor(COLORS, segmentation_maps=GREY, return_tensors="pt").labels.shape == (1, 8, 8)
        assert AutoImageProcessor.from_pretrained(tmp_path).do_center_crop is not whole


# One image in many files, through all doors


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same picture as plain RGB, transparent, of 16 bits, and on its side."""
    folder = tmp_path_factory.mktemp("files")
    values = np.tile(GREY, (1, 2))
    transparent = Image.fromarray(np.where(np.arange(24) < 6, 99, values).astype(np.uint8)).convert("RGBA")
    transparent.putalpha(Image.fromarray(np.where(np.arange(24) < 6, 0, 255).astype(np.uint8)[None].repeat(20, 0)))
    values = np.where(np.arange(24) < 6, 255, values).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).convert("RGB").save(folder / "plain.png")
    transparent.save(folder / "transparent.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(folder / "wide.png")
    Image.fromarray(values).transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def endpoint() -> Any:
    spec = importlib.util.spec_from_file_location("handler", HANDLER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=[1, 3])
def saved(request: Any, make_config: Any, randomize: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("model")
    model = randomize(ASelectDiTForImageClassification(make_config(num_channels=request.param, num_labels=3)))
    save_model(model, folder)
    return model, folder


def test_every_door_gives_the_same_scores(saved: tuple[Any, Path], files: list[Path], endpoint: Any) -> None:
    model, folder = saved
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = torch.cat(list(ImageData.of(files).batches(model.config, 3)))
    assert torch.equal(processor([str(file) for file in files], return_tensors="pt").pixel_values, pixels)
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))
    with torch.no_grad():
        scores = model(pixels[:1]).logits.softmax(-1)[0]
    expected = {
        model.config.id2label[index]: pytest.approx(score.item(), abs=1e-5) for index, score in enumerate(scores)
    }
    run = pipeline("image-classification", model=str(folder))
    answers = run([processor.eight_bit_image(Image.open(file)) for file in files], top_k=3)
    handler = endpoint.EndpointHandler(str(folder))
    encoded = [base64.b64encode(file.read_bytes()).decode() for file in files]
    answers += handler({"inputs": encoded, "parameters": {"top_k": 3}})
    assert len(answers) == 2 * len(files)
    for answer in answers:
        assert {entry["label"]: entry["score"] for entry in answer} == expected


def test_no_pipeline_asks_to_run_code(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package imported, a saved folder's own code is never looked at."""

    def ask(question: str) -> str:
        raise AssertionError(question)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 1)
    save_model(make_model(num_channels=3), tmp_path)
    run = pipeline("image-feature-extraction", model=str(tmp_path))
    assert type(run.image_processor).__module__.startswith("aselect_hf.")
    assert type(run.model).__module__.startswith("aselect_hf.")


class TestHandler:
    @pytest.fixture(scope="class")
    def handler(self, make_config: Any, randomize: Any, tmp_path_factory: Any, endpoint: Any) -> Any:
        folder = tmp_path_factory.mktemp("endpoint")
        save_model(randomize(ASelectDiTForImageClassification(make_config(num_channels=3, num_labels=3))), folder)
        return endpoint.EndpointHandler(str(folder))

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ([], "'inputs' is missing"),
            ({"inputs": [["x"]]}, "'inputs' must be an image"),
            ({"inputs": ["", "x"]}, r"'inputs'\[0\] must be an image"),
            ({"inputs": "AAAA"}, "'inputs' must be an image"),
            ({"inputs": "x", "parameters": "top_k"}, "'parameters' must be an object, got str"),
            ({"inputs": "x", "parameters": {"top_k": "2"}}, "'top_k' must be an integer of at least 1, got '2'"),
            ({"inputs": "x", "parameters": {"top_k": True}}, "'top_k' must be an integer"),
            (
                {"inputs": "x", "parameters": {"function_to_apply": ["softmax"]}},
                "'function_to_apply' must be 'softmax'",
            ),
            ({"inputs": "x", "parameters": {"function_to_apply": "exec"}}, "'function_to_apply' must be 'softmax'"),
            ({"inputs": ["x"] * 65}, "holds 65 images; at most 64"),
        ],
    )
    def test_a_wrong_request_is_named(self, handler: Any, request_: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            handler(request_)

    @pytest.mark.parametrize("form", ["lines", "urlsafe", "data", "unpadded"])
    def test_base64_in_every_form(self, handler: Any, form: str) -> None:
        content = png(COLORS)
        text = base64.b64encode(content).decode()
        text = {
            "lines": base64.encodebytes(content).decode(),
            "urlsafe": base64.urlsafe_b64encode(content).decode(),
            "data": f"data:image/png;base64,{text}",
            "unpadded": text.rstrip("="),
        }[form]
        assert handler({"inputs": text}) == handler({"inputs": content})

    @pytest.mark.parametrize("side", [12_000, 50_000])
    def test_a_huge_image_is_refused_before_it_is_decoded(self, handler: Any, monkeypatch: Any, side: int) -> None:
        content = bytearray(png(GREY))
        content[16:24] = side.to_bytes(4, "big") * 2  # what the header says
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
        with pytest.raises(ValueError, match=r"pixels; at most 50,000,000 are accepted$"):
            handler({"inputs": bytes(content)})

    def test_a_list_is_answered_in_order_and_in_batches(self, handler: Any, endpoint: Any) -> None:
        contents = [png(GENERATOR.integers(0, 256, (9, 8, 3), dtype=np.uint8)) for _ in range(endpoint.BATCH_SIZE + 2)]
        sizes = []
        hook = handler.pipeline.model.register_forward_pre_hook(
            lambda model, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        together = handler({"inputs": contents})
        hook.remove()
        assert sizes == [endpoint.BATCH_SIZE, 2]
        for answer, content in zip(together, contents, strict=True):
            assert {e["label"]: pytest.approx(e["score"], abs=1e-5) for e in answer} == {
                e["label"]: e["score"] for e in handler({"inputs": content})
            }

    def test_a_segmenter_is_bounded_by_its_scores(
        self, make_config: Any, randomize: Any, tmp_path: Any, endpoint: Any
    ) -> None:
        save_model(randomize(ASelectDiTForSemanticSegmentation(make_config(num_channels=3, num_labels=5))), tmp_path)
        handler = endpoint.EndpointHandler(str(tmp_path))
        assert handler.max_pixels == endpoint.MAX_SCORES // 5
        answers = handler({"inputs": [png(COLORS), png(COLORS[:9])]})
        assert json.loads(json.dumps(answers)) == [handler({"inputs": png(part)}) for part in (COLORS, COLORS[:9])]


# Tensors


def test_integer_tensors_are_scaled_or_refused(make_config: Any) -> None:
    config, values = make_config(num_channels=1), torch.from_numpy(GREY[:8, :8].copy())[None, None]
    scaled = torch.cat(list(ImageData.of(values).batches(config, 1)))
    torch.testing.assert_close(scaled, values / 127.5 - 1)
    with pytest.raises(ValueError, match=r"image 0 of images is a tensor of torch.int64: give uint8 values in 0..255"):
        ImageData.of(values.long()).decode(0)


@pytest.mark.parametrize("as_list", [False, True])
def test_the_range_of_pixel_tensors_is_checked(as_list: bool, caplog: Any) -> None:
    unit = torch.from_numpy(GREY[:8, :8].copy())[None, None].float() / 255

    def of(values: torch.Tensor) -> ImageData:
        return ImageData.of(list(values) if as_list else values)

    of(unit * 2 - 1)
    assert not caplog.messages
    of(unit)
    of(unit)
    assert caplog.text.count("If they are images in [0, 1], give x * 2 - 1.") == 1
    of(unit * 6 - 3)
    assert "but models take [-1, 1]. They are used unchanged" in caplog.text
    with pytest.raises(ValueError, match=r"lie in 0..255, but models take \[-1, 1\]: give x / 127.5 - 1"):
        of((unit - unit.min()) / (unit.max() - unit.min()) * 255)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_pixels_are_refused_and_can_be_skipped(value: float, make_config: Any, normal: Any) -> None:
    images = normal(4, 2, 8, 8)
    images[2, 0, 3, 3] = value
    data = ImageData.of(images)
    with pytest.raises(ValueError, match="image 2 of images holds NaN or infinite pixels"):
        list(data.batches(make_config(), 4))
    with pytest.raises(ValueError, match="image 2 of images holds"):
        data.subset([3, 2]).subset([1]).decode(0)
    assert len(data.readable("skip")) == 3
