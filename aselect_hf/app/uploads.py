"""Pictures from strangers: limits, and one friendly line for whatever is no picture."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from aselect_hf.modeling.pixels import eight_bit_image

MAX_MEGABYTES = 20
MAX_PIXELS = 40_000_000
SIDE = 1024


@dataclass(frozen=True)
class Upload:
    """A picture that was read.

    Args:
        key: hash of the file's content.
        picture: mode L or RGB, upright, at most `SIDE` pixels a side.
        note: what a user should know of how it was read; empty if nothing.
    """

    key: str
    picture: Image.Image
    note: str = ""


def read_upload(path: str | None) -> Upload:
    """Read an uploaded file.

    Raises:
        ValueError: there is none, or it is empty, no picture, damaged or too large; the message says so in one line.
    """
    if not path:
        raise ValueError("There is no picture yet: drop one, or choose an example.")
    content = Path(path).read_bytes()
    if not content:
        raise ValueError("This file is empty: choose another picture.")
    if len(content) > MAX_MEGABYTES * 2**20:
        raise ValueError(f"This file has more than {MAX_MEGABYTES} megabytes: choose a smaller picture.")
    try:
        image = Image.open(io.BytesIO(content))
        too_large = image.width * image.height > MAX_PIXELS
        if not too_large:
            picture = eight_bit_image(image, "this picture")
    except Image.DecompressionBombError:
        too_large = True
    except UnidentifiedImageError:
        raise ValueError("This file is not a picture that can be read: try PNG, JPEG or WebP.") from None
    except Exception as error:  # decoders raise anything on broken files
        raise ValueError(f"This picture is damaged or unusual, and cannot be read ({error}).") from None
    if too_large:
        raise ValueError(f"This picture has more than {MAX_PIXELS // 10**6} million pixels: choose a smaller one.")
    note = "Only the first frame of an animation is used." if getattr(image, "is_animated", False) else ""
    picture.thumbnail((SIDE, SIDE))
    return Upload(hashlib.sha256(content).hexdigest(), picture, note)
