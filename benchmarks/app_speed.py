"""How long people wait for the page, with the shipped model: `python -m benchmarks.app_speed [--rounds 5]`.

Measured in Chromium: from the command to a page that shows its first pictures, and from a key on a slider to the facts
and pictures of the new timestep. Needs the extra `test-app`.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from aselect_hf.files import write_json
from aselect_hf.versions import hardware, installed_versions
from benchmarks.app_pictures import browser

OUTPUT = Path(__file__).parent / "results" / "app-speed.json"
MOVES = 12


def measure_round(chromium: object) -> dict[str, float]:
    """Seconds of one start of the server, and medians over moves of the slider."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "aselect_hf", "app", "sample"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(found[1] for line in server.stdout if (found := re.search(r"(http://\S+) \(Ctrl", line)))
        listening = time.perf_counter() - started
        page = chromium.new_page()  # type: ignore[attr-defined]
        page.goto(address)
        facts = page.locator(".facts")
        facts.get_by_text("0 of 1000").wait_for(timeout=120_000)
        usable = time.perf_counter() - started
        slider, moves = page.get_by_role("slider", name="Timestep t (").first, []
        for step in range(1, MOVES + 1):
            pressed = time.perf_counter()
            slider.press("ArrowRight")
            facts.get_by_text(f"{25 * step} of 1000").wait_for(timeout=60_000)
            moves.append(time.perf_counter() - pressed)
        page.close()
        return {"listening": listening, "usable": usable, "move": statistics.median(moves)}
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="starts of the server")
    rounds = parser.parse_args().rounds
    with browser() as chromium:
        found = [measure_round(chromium) for _ in range(rounds)]
    medians = {name: round(statistics.median(each[name] for each in found), 3) for name in found[0]}
    content = {"seconds": medians, "rounds": found, "hardware": hardware(torch.device("cpu"))}
    content["load_average"] = round(os.getloadavg()[1], 1)  # of five minutes: other work on the machine counts
    write_json(OUTPUT, content | {"versions": installed_versions()})
    print(medians)


if __name__ == "__main__":
    main()
