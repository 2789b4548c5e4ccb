"""Make the figures of the README and of docs/ again, and set each beside what the page states.

    python benchmarks/figures.py                       what there is: page, stated, how long it takes, what it needs
    python benchmarks/figures.py --run                 those that take minutes and need nothing that is not here
    python benchmarks/figures.py --run --long --data CIFAR10 --checkpoints FOLDER     all of them, some of a day
    python benchmarks/figures.py --run --only qat-step cpu-latency

What each command printed is kept below build/figures, so a run that was stopped goes on with what is missing; --again
starts over. The table goes to stdout and to build/figures/table.md. A page that no longer states a figure is an error.
Timings want a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "figures"


@dataclass(frozen=True)
class Work:
    """One command and how long it takes.

    Attributes:
        command: Its words; ``{data}``, ``{checkpoints}`` and ``{out}`` are filled in.
        minutes: On two cores.
    """

    command: str
    minutes: float

    @property
    def needs(self) -> list[str]:
        """What has to be given."""
        return [name for name in ("data", "checkpoints") if f"{{{name}}}" in self.command]


@dataclass(frozen=True)
class Figure:
    """A figure that a page states.

    Attributes:
        what: In words.
        page: Below the repository's root.
        stated: A pattern whose group is the figure on the page.
        work: Name of the command that makes it.
        made: A pattern whose group is the figure in what the command prints.
    """

    what: str
    page: str
    stated: str
    work: str
    made: str


WORK = {
    "qat-step": Work("benchmarks/qat_step.py --rounds 5", 12),
    "help-time": Work("benchmarks/help_time.py", 1),
    "prune-cost": Work("benchmarks/prune_cost.py resnet50 --methods magnitude torch-pruning", 3),
    "prune-cost-reconstruct": Work("benchmarks/prune_cost.py resnet50 resnet152 --methods reconstruct", 25),
    "prune-latency": Work("benchmarks/prune_latency.py measured", 8),
    "cpu-latency-files": Work("benchmarks/cpu_latency.py build {out}/cpu_latency --data {data}", 15),
    "cpu-latency": Work("benchmarks/cpu_latency.py time {out}/cpu_latency --rounds 5", 12),
    "int8-parity": Work("benchmarks/int8_parity.py {checkpoints}/resnet20_cifar10.pt --data {data} --images 2500", 10),
    "int8-accuracy": Work(
        "benchmarks/int8_accuracy.py {out}/int8_accuracy {checkpoints}/resnet32_cifar10.th --data {data} "
        "--qat-epochs 0.12 --finetune-epochs 0.3",
        240,
    ),
    "prune-quality-32": Work(
        "benchmarks/prune_quality.py {checkpoints}/resnet32_cifar10.th --data {data} --work {out}/prune_quality_32", 90
    ),
    "prune-quality-20": Work(
        "benchmarks/prune_quality.py {checkpoints}/resnet20_cifar10.pt --data {data} --work {out}/prune_quality_20", 70
    ),
    "prune-quality-32-epoch": Work(
        "benchmarks/prune_quality.py {checkpoints}/resnet32_cifar10.th --data {data} --macs 0.5 --epochs 1 "
        "--work {out}/prune_quality_32",
        180,
    ),
    "prune-quality-32-ten": Work(
        "benchmarks/prune_quality.py {checkpoints}/resnet32_cifar10.th --data {data} --macs 0.5 --epochs 10 --distil 0.9 "
        "--methods reconstruct reconstruct--no-repair torch-pruning --work {out}/prune_quality_32",
        1500,
    ),
    "cifar10": Work(
        "-m rescompress run examples/cifar10_resnet32.yaml -o {out}/cifar10 --json --set data={data} "
        "--set checkpoint={checkpoints}/resnet32_cifar10.th",
        35,
    ),
}
"""Commands by name; one that has to come before another stands before it."""

_N = r"([-\d.,]+)"
_QUALITY = "{} +[\\d.]+ {} +([\\d.]+)"
FIGURES = (
    Figure(
        "training step, ours, times float32",
        "README.md",
        rf"training costs {_N} times the float step",
        "qat-step",
        r"^ours  +[\d.]+ +([\d.]+)$",
    ),
    Figure("training step, NNCF's hooks", "README.md", rf"with NNCF's hooks {_N},", "qat-step", r"^NNCF.* ([\d.]+)$"),
    Figure("training step, ModelOpt", "README.md", rf"with ModelOpt {_N} \(", "qat-step", r"^ModelOpt.* ([\d.]+)$"),
    Figure(
        "magnitude on ResNet-50, s",
        "docs/pruning.md",
        rf"half of the MACs takes {_N} s",
        "prune-cost",
        r"^resnet50 +magnitude +macs \S+ +([\d.]+)",
    ),
    Figure(
        "30 % of every group, s",
        "docs/pruning.md",
        rf"30 % of every group {_N} s",
        "prune-cost",
        r"^resnet50 +magnitude +ratio \S+ +([\d.]+)",
    ),
    Figure(
        "Torch-Pruning, the same, s",
        "docs/pruning.md",
        rf"Torch-Pruning takes {_N} s",
        "prune-cost",
        r"^resnet50 +torch-pruning +ratio \S+ +([\d.]+)",
    ),
    Figure(
        "reconstruct on ResNet-50, s",
        "docs/pruning.md",
        r"^\| ResNet-50 \| \*\*(\d+)\*\*",
        "prune-cost-reconstruct",
        r"^resnet50 +reconstruct +\S+ \S+ +([\d.]+)",
    ),
    Figure(
        "reconstruct on ResNet-152, s",
        "docs/pruning.md",
        r"^\| ResNet-152 \| \*\*(\d+)\*\*",
        "prune-cost-reconstruct",
        r"^resnet152 +reconstruct +\S+ \S+ +([\d.]+)",
    ),
    Figure(
        "half of the MACs in OpenVINO, times faster",
        "docs/pruning.md",
        rf"\*\*{_N} times faster\*\*",
        "prune-latency",
        r"^([\d.]+) times faster",
    ),
    Figure(
        "ResNet-50 float32 in OpenVINO, ms",
        "docs/quantization.md",
        rf"^\| float32 \| OpenVINO \| {_N} \|",
        "cpu-latency",
        r"float32.*OpenVINO\D+([\d.]+)",
    ),
    Figure(
        "ours INT8 in OpenVINO, ms",
        "docs/quantization.md",
        rf"^\| ours INT8, `openvino` profile \| OpenVINO \| {_N} \|",
        "cpu-latency",
        r"ours INT8, .?openvino.? profile\W+OpenVINO\D+([\d.]+)",
    ),
    Figure(
        "NNCF's own INT8 in OpenVINO, ms",
        "docs/quantization.md",
        rf"^\| NNCF's own INT8, default placement \| OpenVINO \| {_N} \|",
        "cpu-latency",
        r"NNCF's own.*?OpenVINO\D+([\d.]+)",
    ),
    Figure(
        "parity, exact sums and OpenVINO, %",
        "docs/export.md",
        rf"exact sums in torch and OpenVINO \| [^|]+\| \*\*{_N} %",
        "int8-parity",
        r"openvino +.*exact.*OpenVINO +([\d.]+)%",
    ),
    Figure(
        "calibrated ResNet-32, drop in points",
        "docs/quantization.md",
        rf"dense, calibrated \| 88.84 % \| 88.81 % \| {_N}",
        "int8-accuracy",
        r"\bptq +3 +[\d.]+ +[\d.]+ +([-\d.]+)",
    ),
    Figure(
        "trained ResNet-32, drop in points",
        "docs/quantization.md",
        rf"dense, trained 0.12 epochs \| 88.84 % \| 88.90 % \| {_N}",
        "int8-accuracy",
        r"\bqat +3 +[\d.]+ +[\d.]+ +([-\d.]+)",
    ),
    Figure(
        "ResNet-32 at 0.50, ours",
        "README.md",
        rf"ResNet-32 \(dense 88.84\) \| 0.50 \| \*\*{_N}\*\*",
        "prune-quality-32",
        _QUALITY.format(r"^ *0\.50", "reconstruct"),
    ),
    Figure(
        "ResNet-32 at 0.50, Torch-Pruning",
        "README.md",
        rf"ResNet-32 \(dense 88.84\) \| 0.50 \| [^|]+\| {_N} ",
        "prune-quality-32",
        _QUALITY.format(r"^ *0\.50", "torch-pruning"),
    ),
    Figure(
        "ResNet-20 at 0.50, ours",
        "README.md",
        rf"ResNet-20 \(dense 88.14\) \| 0.50 \| \*\*{_N}\*\*",
        "prune-quality-20",
        _QUALITY.format(r"^ *0\.50", "reconstruct"),
    ),
    Figure(
        "ResNet-20 at 0.50, Torch-Pruning",
        "README.md",
        rf"ResNet-20 \(dense 88.14\) \| 0.50 \| [^|]+\| {_N} ",
        "prune-quality-20",
        _QUALITY.format(r"^ *0\.50", "torch-pruning"),
    ),
    Figure(
        "ResNet-32, one epoch, ours",
        "docs/pruning.md",
        rf"ResNet-32 \| one epoch, labels alone \| \*\*{_N}\*\*",
        "prune-quality-32-epoch",
        _QUALITY.format(r"^ *0\.50", "reconstruct"),
    ),
    Figure(
        "ResNet-32, ten epochs distilled, ours",
        "docs/pruning.md",
        rf"ten epochs, distilled \| {_N} ",
        "prune-quality-32-ten",
        _QUALITY.format(r"^ *0\.50", "reconstruct"),
    ),
    Figure(
        "CIFAR-10 run, quantize, %",
        "docs/cifar10.md",
        rf"ResNet-32 on CIFAR-10 \(JPEG[\s\S]*?^\| quantize \| {_N} ",
        "cifar10",
        r"@quantize:top1",
    ),
    Figure(
        "CIFAR-10 run, OpenVINO, ms",
        "docs/cifar10.md",
        rf"ResNet-32 on CIFAR-10 \(JPEG[\s\S]*?^\| target:cpu \|.*\| {_N} ms \(",
        "cifar10",
        r"@target:cpu:p50_ms",
    ),
)


def stated(figure: Figure) -> str:
    """Return the figure as its page states it."""
    text = (ROOT / figure.page).read_text(encoding="utf-8")
    found = re.search(figure.stated, text, re.M)
    if found is None:
        sys.exit(f"{figure.page} no longer states: {figure.what}")
    return found[1].strip("*")


def made(figure: Figure, out: Path) -> str | None:
    """Return the figure as it was made here, or None where it was not, or where what was printed lacks it."""
    path = out / f"{figure.work}.txt"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    if figure.made.startswith("@"):
        stage, _, metric = figure.made[1:].rpartition(":")
        rows = {s["stage"]: s["metrics"] for s in json.loads(text)["stages"]}
        value = rows.get(stage, {}).get(metric, {}).get("value")
        return None if value is None else f"{100 * value:.2f}" if metric == "top1" else f"{value:.3g}"
    found = re.search(figure.made, text, re.M)
    return found[1] if found else None


def run(name: str, work: Work, given: dict[str, str], out: Path) -> None:
    """Run a command and keep what it printed; nothing is kept of one that fails."""
    command = [sys.executable, *shlex.split(work.command.format(**given))]
    print(f"{name}: about {work.minutes:g} minutes: {shlex.join(command[1:])}", file=sys.stderr, flush=True)
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{name}: failed with {done.returncode}", file=sys.stderr)
        return
    partial = out / f".{name}.partial"
    partial.write_text(done.stdout, encoding="utf-8")
    partial.replace(out / f"{name}.txt")
    print(f"{name}: {(time.monotonic() - begin) / 60:.1f} minutes", file=sys.stderr)


def table(out: Path, given: dict[str, str]) -> str:
    """Return the figures as they are stated and as they were made, as Markdown."""
    lines = ["| figure | page | stated | made here | command | minutes |", "|---|---|---:|---:|---|---:|"]
    for figure in FIGURES:
        work = WORK[figure.work]
        lacking = [f"--{name}" for name in work.needs if not given.get(name)]
        missing = f"needs {' '.join(lacking)}" if lacking else "not yet"
        ran = (out / f"{figure.work}.txt").is_file()
        value = made(figure, out) or ("not printed" if ran else missing)
        lines.append(f"| {figure.what} | {figure.page} | {stated(figure)} | {value} | {figure.work} | {work.minutes:g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what was asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--long", action="store_true", help="also what takes longer than 15 minutes")
    parser.add_argument("--only", nargs="+", choices=sorted(WORK), default=[])
    parser.add_argument("--data", default="", help="CIFAR-10 as class folders")
    parser.add_argument("--checkpoints", default="", help="folder with resnet20_cifar10.pt and resnet32_cifar10.th")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    paths = {"data": options.data, "checkpoints": options.checkpoints, "out": options.out}
    given = {name: str(Path(path).resolve()) if path else "" for name, path in paths.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, work in WORK.items() if options.run else ():
        wanted = name in options.only if options.only else options.long or work.minutes <= 15
        if not wanted or any(not given[need] for need in work.needs):
            continue
        if options.again or not (options.out / f"{name}.txt").is_file():
            run(name, work, given, options.out)
    text = table(options.out, given)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
