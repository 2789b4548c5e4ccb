"""Reads tegrastats, which tells a Jetson's power, memory, load, clocks and temperatures: as figures, or as a series in time."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass

AT_WORK, MEDIAN = "GPU at work", "median of all"

WORKS = 0.5
"""Share of the highest load of the GPU from which on it counts as working: while trtexec starts CUDA, loads the engine and
ends, its load is next to nothing."""

IDLE_PERCENT = 10
"""Load of the GPU, in percent, that says nothing: on a DLA its highest load is that of the desktop."""


@dataclass(frozen=True)
class Watched:
    """What tegrastats saw.

    Attributes:
        power_w: Power of the module while the GPU works, from the lines that `power_of` names; None where no line tells it.
        memory_mb: Largest memory in use.
        samples: Lines.
        unknown_rails: The power rails of a board of which it is not known whether and how they add up to the module.
        power_of: ``GPU at work``, or ``median of all`` where no line tells that the GPU works.
        power_lines: How many lines `power_w` is taken from.
    """

    power_w: float | None
    memory_mb: float | None
    samples: int
    unknown_rails: tuple[str, ...] = ()
    power_of: str = AT_WORK
    power_lines: int = 0


TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
"""Rails that feed the whole module; VIN, of the Thor, is measured on the carrier board and feeds that too."""

SUMMED_RAILS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
"""Rails that together feed the module, where there is no total: of the AGX Orin (its VDDQ_VDD2_1V8AO is no part of the sum)
and of the AGX Xavier."""

RAIL = re.compile(r"(?<!\S)([A-Z]\w*) ([0-9]{1,7})(?:mW)?/\d+(?:mW)?(?!\S)")
"""Name and present power in mW of a rail in a line of tegrastats; no module takes ten kilowatts."""

MEMORY = re.compile(r"\bRAM ([0-9]{1,8})/\d+MB")
LOAD = re.compile(r"\bGR3D_FREQ ([0-9]{1,3})%")

CLOCK = re.compile(r"\bGR3D_FREQ (?:[0-9]{1,3}%)?@\[?([0-9]{1,5}(?:,[0-9]{1,5})*)")
"""GPU clock in MHz: one figure, or one for each cluster."""

TEMPERATURES = tuple(
    re.compile(rf"(?<!\S){name}@(-?[0-9]{{1,3}}(?:\.[0-9]{{1,3}})?)C(?!\S)", re.IGNORECASE) for name in ("GPU", "TJ")
)
"""Of the GPU; else of the hottest place, which some releases tell alone."""

COLDEST_C = -100.0
"""A sensor that is off reads -256."""


@dataclass(frozen=True)
class Reading:
    """One line of tegrastats; None where it does not tell.

    Attributes:
        s: Seconds since the first line.
        load_percent: Of the GPU.
        clock_mhz: Of the GPU's fastest cluster.
        temperature_c: Of the GPU, or of the hottest place.
        power_w: Of the module.
        memory_mb: In use.
    """

    s: float
    load_percent: float | None = None
    clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    memory_mb: float | None = None


def parse_trace(text: str, *, interval_s: float) -> list[Reading]:
    """Return the lines of a log as a series in time; lines that tell nothing of it take their time all the same.

    Args:
        text: The log.
        interval_s: Between two lines, as tegrastats was asked for: only newer releases print the time.
    """
    readings = []
    for i, line in enumerate(line for line in text.splitlines() if line.strip()):
        load, clock, ram = LOAD.search(line), CLOCK.search(line), MEMORY.search(line)
        found = next((m for t in TEMPERATURES if (m := t.search(line)) and float(m[1]) > COLDEST_C), None)
        readings.append(
            Reading(
                i * interval_s,
                float(load[1]) if load else None,
                max(map(float, clock[1].split(","))) if clock else None,
                float(found[1]) if found else None,
                _power(line)[0],
                float(ram[1]) if ram else None,
            )
        )
    return readings


def _power(line: str) -> tuple[float | None, tuple[str, ...]]:
    """Return the power of the module in W; None, and the rails that the line has, where they are not known to add up to it."""
    rails = {name: float(mw) / 1000.0 for name, mw in RAIL.findall(line)}
    known = next((r for r in (*((n,) for n in TOTAL_RAILS), *SUMMED_RAILS) if rails.keys() >= set(r)), None)
    return (None, tuple(rails)) if known is None else (sum(rails[n] for n in known), ())


def parse_tegrastats(text: str) -> Watched:
    """Return power while the GPU works and largest memory of a tegrastats log.

    tegrastats runs as long as trtexec, which is idle at both ends; these lines are left out by ``GR3D_FREQ``, the load of the
    GPU. Where that is not told, the median of all lines stands in: timing takes most of them.

    A line reads ``RAM 2448/7620MB (...) ... VDD_IN 5017mW/4987mW VDD_CPU_GPU_CV 1234mW/1200mW``: now and average of each
    rail; older releases write ``POM_5V_IN 2145/2145`` in mW without the unit.
    """
    powers: list[tuple[float, int]] = []
    memories = []
    unknown: dict[str, None] = {}
    for line in text.splitlines():
        ram = MEMORY.search(line)
        if ram:
            memories.append(float(ram[1]))
        power, others = _power(line)
        if power is not None:
            powers.append((power, int(load[1]) if (load := LOAD.search(line)) else 0))
        else:
            unknown |= dict.fromkeys(others)
    highest = max((load for _, load in powers), default=0)
    at_work = [w for w, load in powers if load >= WORKS * highest] if highest > IDLE_PERCENT else []
    power = statistics.fmean(at_work) if at_work else statistics.median(w for w, _ in powers) if powers else None
    return Watched(
        power,
        max(memories) if memories else None,
        max(len(powers), len(memories)),
        () if powers else tuple(unknown),
        AT_WORK if at_work else MEDIAN,
        len(at_work or powers),
    )
