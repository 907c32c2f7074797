"""Make the pictures of the page for the documentation: `python -m benchmarks.app_pictures [--screenshots]`.

`walk.webp` moves over the noise axis and needs this package alone. The screenshots need the extra `test-app`, and
Chromium on the path.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from aselect_hf.hub.space import TEMPLATES, THUMBNAIL
from aselect_hf.pictures import FeatureColors, noise_strip, pca_map, similarity_map, sweep_picture
from aselect_hf.pictures.maps import enlarged

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
ROWS = (1, 2, 5)
"""Pictures of the validation split: a pullover, a sandal, a sneaker."""
SIDE, GAP, TEXT = 168, 8, 22
MILLISECONDS = 140
WIDTHS = {1440: 900, 390: 844}


def walk_frames(timesteps: list[int]) -> Iterator[Image.Image]:
    """One frame per timestep: a row per picture with the noisy input, the feature as colors, and the click map."""
    model = load_model("sample").eval()
    data = ImageData.of(load_images("sample", "validation"), name="sample")
    feature = str(model.config.feature)
    sweeps = [sweep_picture(model, data.decode(row), timesteps, [feature]) for row in ROWS]
    colors = [FeatureColors.fit(sweep.features[feature]) for sweep in sweeps]
    font, width = ImageFont.load_default(14), 3 * len(ROWS) * (SIDE + GAP) // len(ROWS) - GAP
    for t in timesteps:
        frame = Image.new("RGB", (width, 2 * TEXT + len(ROWS) * (SIDE + GAP)), "white")
        draw = ImageDraw.Draw(frame)
        place = width * t / (model.noise_schedule.num_train_timesteps - 1)
        draw.rectangle((0, 2, width, 8), fill="#d8dee4")
        draw.rectangle((0, 2, place, 8), fill="#1f6feb")
        draw.ellipse((place - 6, -1, place + 6, 11), fill="#1f6feb")
        sigma = model.noise_schedule.sigma(t)
        for column, title in enumerate((f"t = {t}, sigma {sigma:.2f}", feature, "similarity to one patch")):
            draw.text((column * (SIDE + GAP), TEXT - 6), title, "black", font)
        for index, (sweep, color) in enumerate(zip(sweeps, colors, strict=True)):
            tokens, grid = sweep.at(feature, t), sweep.grid_size
            patch = (grid[0] // 2, grid[1] // 2)
            tiles = (
                enlarged(sweep.noisy_picture(t), SIDE),
                pca_map(tokens, grid, colors=color, side=SIDE),
                similarity_map(tokens, grid, patch, side=SIDE),
            )
            for column, tile in enumerate(tiles):
                frame.paste(tile, (column * (SIDE + GAP), 2 * TEXT + index * (SIDE + GAP)))
        yield frame


def draw_walk(path: Path) -> None:
    """The animation: from clean to noise and back."""
    frames = list(walk_frames(list(range(0, 701, 25))))
    frames += frames[-2:0:-1]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0, lossless=True, method=6
    )


def draw_thumbnail(path: Path) -> None:
    """What links to a Space show: a sneaker along the noise axis."""
    picture = ImageData.of(load_images("sample", "validation"), name="sample").decode(ROWS[-1])
    noise_strip(load_model("sample").eval(), picture, [0, 100, 200, 400]).save(path, optimize=True)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """The system's Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


def take_screenshots(folder: Path) -> None:
    """The three tabs, as wide as a desk and as a phone."""
    from aselect_hf.app import Workbench, load_shown
    from aselect_hf.app.server import serve

    page, address = serve(Workbench([load_shown("sample")]))
    with browser() as chromium:
        for width, height in WIDTHS.items():
            tab = chromium.new_page(viewport={"width": width, "height": height})
            tab.goto(address)
            tab.locator(".facts b").first.wait_for()
            tab.get_by_role("slider", name="Timestep t (").first.press("ArrowRight")
            for _ in range(5):
                tab.keyboard.press("ArrowRight")
            for name in ("Walk the noise", "Predict", "Compare"):
                tab.get_by_role("tab", name=name).click()
                if name == "Compare":
                    tab.locator(".wall").nth(1).wait_for(timeout=60_000)
                time.sleep(3)
                for place in (5000, -9000):  # pictures are loaded where they are seen
                    tab.mouse.wheel(0, place)
                    time.sleep(0.5)
                shot = folder / "shot.png"
                tab.screenshot(path=shot, full_page=True)
                with Image.open(shot) as image:
                    image.convert("RGB").save(
                        folder / f"app-{name.split()[0].lower()}-{width}.webp", quality=80, method=6
                    )
                shot.unlink()
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screenshots", action="store_true", help="also take the screenshots of the page")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    draw_walk(FOLDER / "walk.webp")
    draw_thumbnail(TEMPLATES / THUMBNAIL)
    if arguments.screenshots:
        take_screenshots(FOLDER)


if __name__ == "__main__":
    main()
