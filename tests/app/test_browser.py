"""The page in a real browser: what people do with it, and what they do wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aselect_hf import select_timestep
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from aselect_hf.report import write_report
from tests.app.conftest import start

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.app

SLOW = 30_000  # milliseconds
SAMPLE = load_model("sample")
START = 25 * round(SAMPLE.default_timestep / 25)
"""Where the slider stands at first."""
BAD = {
    "empty.png": (b"", "This file is empty"),
    "text.png": (b"this is no picture", "not a picture that can be read"),
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, address) -> Iterator[Callable[..., Any]]:
    """`open_page(width=1440)`: the page for one more user, ready; hosts and errors that it met are its attributes."""
    contexts = []

    def open_page(width: int = 1440) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.hosts, page.errors = set(), []
        page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]) if "//" in request.url else None)
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        expect_fact(page, "blocks.4.mlp")
        return page

    yield open_page
    for context in contexts:
        context.close()


def expect_fact(page: Any, text: str) -> None:
    playwright.expect(page.locator(".facts")).to_contain_text(text, timeout=SLOW)


def move(page: Any, label: str, key: str, times: int = 1) -> None:
    slider = page.get_by_role("slider", name=label).first
    for _ in range(times):
        slider.press(key)


def picture_at(page: Any, label: str) -> bytes:
    """The bytes of the picture that the page shows under a label, once it is there."""
    image = page.locator(".patches", has_text=label).locator("img").first
    image.wait_for(timeout=SLOW)
    return page.request.get(image.get_attribute("src")).body()


def give(page: Any, path: Path) -> None:
    """Put a file in place of the picture."""
    page.locator("#picture").get_by_label(re.compile("clear|remove", re.IGNORECASE)).first.click()
    page.locator("#picture input[type=file]").set_input_files(path)


def test_it_asks_no_other_host_and_meets_no_error(open_page, address):
    page = open_page()
    for name in ("Predict", "Compare"):
        page.get_by_role("tab", name=name).click()
    page.locator(".wall img").first.wait_for(timeout=SLOW)
    assert page.hosts == {address.split("/")[2]}
    assert page.errors == []


def test_both_sliders_move_all_pictures(open_page):
    page = open_page()
    before = {label: picture_at(page, label) for label in ("Noisy input", "Feature as colors", "Similarity")}
    move(page, "Timestep t (", "ArrowRight", 8)
    expect_fact(page, f"t {START + 200} of 1000")
    expect_fact(page, f"sigma {SAMPLE.noise_schedule.sigma(START + 200):.3f}")
    after = {label: picture_at(page, label) for label in before}
    assert [label for label in before if before[label] == after[label]] == []
    move(page, "Block", "ArrowLeft")
    expect_fact(page, "blocks.3.mlp")
    assert picture_at(page, "Noisy input") == after["Noisy input"]
    assert picture_at(page, "Feature as colors") != after["Feature as colors"]


def test_a_later_move_is_instant(open_page):
    page = open_page()
    seconds = []
    for step in range(1, 6):
        started = time.perf_counter()
        move(page, "Timestep t (", "ArrowRight")
        expect_fact(page, f"t {START + 25 * step} of")
        seconds.append(time.perf_counter() - started)
    assert sorted(seconds)[2] < 2, seconds


def test_a_click_chooses_the_patch(open_page):
    page = open_page()
    before = picture_at(page, "Similarity")
    image = page.locator(".patches", has_text="Feature as colors").locator("img").first
    box = image.bounding_box()
    image.click(position={"x": box["width"] * 0.95, "y": box["height"] * 0.05})
    page.get_by_text("Patch by keyboard").click()
    playwright.expect(page.get_by_role("slider", name="Column of the patch")).to_have_value("6", timeout=SLOW)
    playwright.expect(page.get_by_role("slider", name="Row of the patch")).to_have_value("0")
    page.wait_for_timeout(1000)
    assert picture_at(page, "Similarity") != before


def test_an_upload_is_predicted(open_page, trousers):
    page = open_page()
    page.get_by_role("tab", name="Predict").click()
    give(page, trousers)
    playwright.expect(page.locator("[data-testid=label-output-value]")).to_contain_text("Trouser", timeout=SLOW)
    playwright.expect(page.locator(".about").first).to_contain_text("49 tokens of width 144")


def test_compare_shows_neighbors_of_both_sides(open_page):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    playwright.expect(page.locator(".wall")).to_have_count(2, timeout=SLOW)
    walls = [page.locator(".wall").nth(side).inner_text() for side in (0, 1)]
    assert walls[0] != walls[1]
    move(page, "Timestep t A", "End")
    playwright.expect(page.locator(".wall").first).not_to_have_text(walls[0], use_inner_text=True, timeout=SLOW)


def choose_model(page: Any, name: str) -> None:
    page.get_by_label("Model", exact=True).first.click()
    page.get_by_role("option", name=name).click()


def test_another_model_has_its_own_sliders_and_confidence(open_page):
    page = open_page()
    choose_model(page, "classifier")
    expect_fact(page, "blocks.1.query")
    playwright.expect(page.get_by_role("slider", name="Block").first).to_have_attribute("max", "2")
    playwright.expect(page.get_by_label("Confidence of the head over the timesteps")).to_have_count(1, timeout=SLOW)


def test_a_segmented_picture_has_a_legend_and_an_opacity(open_page):
    page = open_page()
    page.get_by_role("tab", name="Predict").click()
    choose_model(page, "segmenter")
    playwright.expect(page.locator(".legend")).to_contain_text("%", timeout=SLOW)
    segments = page.get_by_alt_text("Segmented picture")
    before = segments.get_attribute("src")
    move(page, "Opacity", "End")
    playwright.expect(segments).not_to_have_attribute("src", before, timeout=SLOW)


def test_a_second_picture_shows_the_similarity(open_page, trousers):
    page = open_page()
    before = picture_at(page, "Similarity")
    page.get_by_text("Patch by keyboard").click()
    page.locator("#second input[type=file]").set_input_files(trousers)
    image = page.locator(".patches", has_text="Similarity").locator("img").first
    playwright.expect(image).not_to_have_attribute("src", image.get_attribute("src"), timeout=SLOW)
    assert picture_at(page, "Similarity") != before


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gives_one_line_and_the_page_goes_on(open_page, trousers, tmp_path, name):
    page, (content, message) = open_page(), BAD[name]
    (tmp_path / name).write_bytes(content)
    give(page, tmp_path / name)
    page.get_by_text(message).first.wait_for(timeout=SLOW)
    before = picture_at(page, "Noisy input")
    give(page, trousers)
    page.wait_for_timeout(3000)
    assert picture_at(page, "Noisy input") != before


def test_a_file_beyond_the_limit_is_refused(open_page, tmp_path):
    page = open_page()
    (tmp_path / "large.png").write_bytes(os.urandom(21 * 2**20))
    give(page, tmp_path / "large.png")
    page.get_by_text(re.compile("exceeds|too large|maximum", re.IGNORECASE)).first.wait_for(timeout=SLOW)


def test_two_users_see_their_own_pictures(open_page, trousers):
    one, other = open_page(), open_page()
    before = picture_at(one, "Noisy input")
    give(other, trousers)
    move(other, "Timestep t (", "ArrowRight", 4)
    expect_fact(other, f"t {START + 100} of")
    other.wait_for_timeout(2000)
    expect_fact(one, f"t {START} of")
    assert picture_at(one, "Noisy input") == before
    assert picture_at(other, "Noisy input") != before


def test_a_reload_starts_anew(open_page):
    page = open_page()
    move(page, "Timestep t (", "ArrowRight", 3)
    expect_fact(page, f"t {START + 75} of")
    page.reload()
    expect_fact(page, f"t {START} of")


def test_a_server_that_stops_is_reported(chromium):
    server, address = start("sample")
    page = chromium.new_page()
    page.goto(address)
    expect_fact(page, "blocks.4.mlp")
    server.kill()
    server.wait()
    move(page, "Timestep t (", "ArrowRight")
    page.get_by_text(re.compile("connection|could not|failed", re.IGNORECASE)).first.wait_for(timeout=SLOW)
    page.close()


def test_a_phone_needs_no_sideways_scrolling(open_page):
    page = open_page(390)
    for name in ("Predict", "Compare", "Walk the noise"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    choose_model(page, "classifier")
    expect_fact(page, "blocks.1.query")
    plots = page.locator(".plot")
    playwright.expect(plots).to_have_count(2, timeout=SLOW)
    assert min(plots.nth(index).bounding_box()["width"] for index in (0, 1)) > 280


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The source of axe, from the package registry of the machine."""
    folder = tmp_path_factory.mktemp("axe")
    packed = subprocess.run(["npm", "pack", "axe-core@4"], cwd=folder, capture_output=True, check=False)
    if packed.returncode:
        pytest.skip("needs npm and a registry that has axe-core")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder)
    return (folder / "package" / "axe.min.js").read_text(encoding="utf-8")


def serious(page: Any, axe: str) -> list[str]:
    """Serious and critical findings, one line each."""
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{each['id']}: {node['html'][:150]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("name", ["Walk the noise", "Predict", "Compare"])
def test_a_tab_is_accessible(open_page, axe, name):
    page = open_page()
    page.get_by_role("tab", name=name).click()
    page.wait_for_timeout(2500)
    assert serious(page, axe) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_opens_alone(chromium, axe, tmp_path, scheme):
    model, images = load_model("sample").eval(), ImageData.of(load_images("sample", "test"), name="sample")
    selection = select_timestep(model, images, method="hfr", num_images=8, timesteps=10)
    path = write_report(tmp_path / "report.html", selection, model, images, command="aselect select")
    page = chromium.new_context(color_scheme=scheme).new_page()
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.goto(path.as_uri())
    page.get_by_text("Versions").wait_for()
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert messages == []
    assert serious(page, axe) == []
