"""How long `rescompress --help` takes beside the `--help` of a Typer application with two commands.

    python benchmarks/help_time.py [runs]

Prints the median CPU time (user + system) and wall-clock time of each, runs taken in turns, and the ratio.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TWO = """import typer

app = typer.Typer()


@app.command()
def one(x: int = 1) -> None:
    "One."


@app.command()
def two(x: int = 1) -> None:
    "Two."


app()
"""


def cost(command: list[str]) -> tuple[float, float]:
    """Return CPU and wall-clock seconds of one run."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=Path(__file__).parents[1])
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "two.py"
        script.write_text(TWO)
        commands = {"two-command Typer app": [sys.executable, str(script), "--help"]}
        commands["rescompress"] = [sys.executable, "-m", "rescompress", "--help"]
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                samples[name].append(cost(command))
    medians = {name: [statistics.median(s) for s in zip(*each, strict=True)] for name, each in samples.items()}
    for name, (cpu, wall) in medians.items():
        print(f"{name:24} cpu {cpu:.3f} s   wall {wall:.3f} s")
    ours, theirs = medians["rescompress"], medians["two-command Typer app"]
    print(f"{'ratio':24} cpu {ours[0] / theirs[0]:.2f}     wall {ours[1] / theirs[1]:.2f}")


if __name__ == "__main__":
    main()
