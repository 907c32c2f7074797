"""Whatever a stranger uploads is read as every other part of the package reads it, or refused in one friendly line."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from aselect_hf.app import uploads
from aselect_hf.app.uploads import read_upload
from aselect_hf.modeling.pixels import eight_bit_image
from tests.app.conftest import COLORS, encoded

PICTURE = Image.fromarray(COLORS)
SIXTEEN = Image.fromarray(COLORS[..., 0].astype(np.uint16) * 257)
READ = {
    "cmyk.jpg": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "sixteen.png": encoded(SIXTEEN, "PNG"),
    "alpha.png": encoded(PICTURE.convert("RGBA"), "PNG"),
    "palette.gif": encoded(PICTURE.convert("P"), "GIF"),
    "one-pixel.png": encoded(Image.new("L", (1, 1)), "PNG"),
}
REFUSED = {
    "empty.png": (b"", "This file is empty"),
    "text.png": (b"hello, this is no picture", "not a picture that can be read"),
    "page.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture that can be read"),
    "cut.png": (encoded(PICTURE, "PNG")[:200], "damaged"),
}


@pytest.mark.parametrize("name", READ)
def test_unusual_pictures_are_read(write, name):
    path = write(name, READ[name])
    with Image.open(path) as image:
        expected = eight_bit_image(image)
    np.testing.assert_array_equal(np.asarray(read_upload(path).picture), np.asarray(expected))


def test_sixteen_bits_are_not_clipped(write):
    np.testing.assert_array_equal(np.asarray(read_upload(write("16.png", READ["sixteen.png"])).picture), COLORS[..., 0])


def test_an_animation_gives_its_first_frame_and_says_so(write):
    frames = [Image.new("L", (9, 9), value) for value in (10, 200)]
    found = read_upload(write("moving.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert (np.asarray(found.picture.convert("L")).max(), "first frame" in found.note) == (10, True)


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_in_one_line(write, name):
    content, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        read_upload(write(name, content))
    assert "\n" not in str(error.value)


def test_limits(write, monkeypatch):
    path = write("picture.png", encoded(PICTURE, "PNG"))
    monkeypatch.setattr(uploads, "MAX_PIXELS", 700)
    with pytest.raises(ValueError, match="million pixels"):
        read_upload(path)
    monkeypatch.setattr(uploads, "MAX_MEGABYTES", 0)
    with pytest.raises(ValueError, match="more than 0 megabytes"):
        read_upload(path)
    with pytest.raises(ValueError, match="no picture yet"):
        read_upload(None)


def test_the_name_of_a_file_does_not_matter(write):
    first, second = (read_upload(write(name, encoded(PICTURE, "PNG"))) for name in ("a.png", "b.png"))
    assert first.key == second.key
    assert read_upload(write("c.png", encoded(PICTURE.rotate(90), "PNG"))).key != first.key


def test_large_pictures_are_made_smaller(write):
    assert max(read_upload(write("large.png", encoded(Image.new("L", (3000, 10)), "PNG"))).picture.size) == 1024
