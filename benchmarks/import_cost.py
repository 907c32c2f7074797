"""What does importing the package cost, and starting its command line?

    python -m benchmarks.import_cost

Protocol. Every statement runs in a fresh Python process. The statements take turns, `--rounds` times, so that other
load on the machine hits all alike; the first round fills the caches of the file system and is not counted. A cost is
the median of user and system CPU seconds of the process, as the operating system counts them. The package is compared
with a vision model of transformers, the command line with the libraries that print its help. Writes
`benchmarks/results/import-cost.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ASELECT = (
    "import sys; sys.argv = ['aselect', {}]\nfrom aselect_cli.app import main\ntry: main()\nexcept SystemExit: pass"
)
STATEMENTS = {
    "vision model": "from transformers import ViTForImageClassification",
    "package": "import aselect_hf",
    "help libraries": "import typer, rich.markdown",
    "help": ASELECT.format("'--help'"),
    "help of a command": ASELECT.format("'select', '--help'"),
    "mistyped option": ASELECT.format("'select', '--metod', 'hfr'"),
}


def cpu_seconds(statement: str) -> float:
    """User and system seconds of a Python process that runs one statement; what it prints is dropped."""
    process = subprocess.Popen([sys.executable, "-c", statement], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{statement!r} fails: exit code {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


def measure(statements: Mapping[str, str], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every statement, round by round; see the protocol."""
    seconds: dict[str, list[float]] = {name: [] for name in statements}
    for turn in range(rounds + 1):
        for name, statement in statements.items():
            cost = cpu_seconds(statement)
            if turn:
                seconds[name].append(cost)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    seconds = measure(STATEMENTS, rounds)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratio = medians["package"] / medians["vision model"]
    print(*(f"{median:6.2f} s  {name}" for name, median in medians.items()), sep="\n")
    print(f"The package takes {ratio:.2f} times as long as a vision model of transformers.")
    save(medians, seconds, ratio)


def save(medians: dict[str, float], seconds: dict[str, list[float]], ratio: float) -> None:
    """Write the results with what they depend on; imports torch, so it comes last."""
    import torch

    from aselect_hf.files import write_json
    from aselect_hf.versions import hardware, installed_versions

    content = {
        "median_cpu_seconds": medians,
        "package_over_vision_model": ratio,
        "cpu_seconds": seconds,
        "protocol": {"hardware": hardware(torch.device("cpu")), "versions": installed_versions()},
    }
    write_json(RESULTS / "import-cost.json", content)


if __name__ == "__main__":
    main()
