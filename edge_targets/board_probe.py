"""What a board says about itself: model, TensorRT, trtexec, power mode, clocks, disk."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from edge_targets import trt_builder
from edge_targets.catalog import identify
from edge_targets.device import mode_name
from edge_targets.ssh import Board
from edge_targets.trtexec import (
    LOCATIONS,
)
from rescompress.core.errors import TargetError, ToolMissing


@dataclass(frozen=True)
class Probe:
    """What a board says about itself.

    Attributes:
        model: From the device tree; None on other machines.
        device: Its name in the catalogue, or None.
        trtexec: Path of trtexec; None where the Python module of TensorRT has to do.
        version: Version of TensorRT, as text.
        power_mode: From nvpmodel, or None where that is not allowed or not there.
        clocks: From jetson_clocks, likewise.
        flags: Every flag that ``trtexec --help`` names; empty where it names none.
        tegrastats: Whether power and memory can be watched.
        free_bytes: In the folder for temporary files.
    """

    model: str | None
    device: str | None
    trtexec: str | None
    version: str
    power_mode: str | None
    clocks: str | None
    flags: frozenset[str]
    tegrastats: bool
    free_bytes: int | None

    @property
    def identity(self) -> dict[str, str | bool | None]:
        """What it contributes to the key of a measurement: what stays as it is from one call to the next."""
        facts = {"model": self.model, "device": self.device, "version": self.version, "power_mode": self.power_mode}
        return {**facts, "trtexec": self.trtexec, "tegrastats": self.tegrastats}


PROBE = r"""
exec 2>/dev/null
echo "@@model"; tr -d '\000' < /proc/device-tree/model 2>/dev/null; echo
echo "@@free"; df -Pk "${TMPDIR:-/tmp}" 2>/dev/null | awk 'NR==2 {print $4}'
echo "@@nvpmodel"; { nvpmodel -q 2>/dev/null || sudo -n nvpmodel -q 2>/dev/null; } | head -n 4
echo "@@clocks"; sudo -n jetson_clocks --show 2>/dev/null
echo "@@tegrastats"; command -v tegrastats 2>/dev/null
echo "@@trtexec"
for t in LOCATIONS; do p=$(command -v "$t" 2>/dev/null) && { echo "$p"; break; }; done
echo "@@help"; [ -n "$p" ] && "$p" --help 2>&1
echo "@@python"; [ -z "$p" ] && python3 -c 'import tensorrt; print("[TensorRT", tensorrt.__version__ + "]")' 2>/dev/null
echo "@@end"
""".replace("LOCATIONS", " ".join(shlex.quote(t) for t in LOCATIONS))


def probe(board: Board) -> Probe:
    """Return what a board says about itself.

    Raises:
        EnvironmentFailed: The connection failed.
        ToolMissing: There is no ssh here, or neither trtexec nor the Python module of TensorRT there.
        TargetError: Its TensorRT is too old, or tells no version.
    """
    output = board.run(f"sh -c {shlex.quote(PROBE)}").output
    parts = {m[1]: m[2].strip() for m in re.finditer(r"^@@(\w+)\n(.*?)(?=^@@)", output, re.MULTILINE | re.DOTALL)}
    # what the shell says on stderr travels apart and may arrive in the middle; the path is what is printed last
    trtexec = parts.get("trtexec", "").rpartition("\n")[2]
    module = re.search(r"\[TensorRT ([0-9]+\.[0-9]+\.[0-9]+)", parts.get("python", ""))
    if not trtexec and module is None:
        raise ToolMissing(
            f"no trtexec there (looked for {', '.join(LOCATIONS)}), and no Python module of TensorRT",
            where=board.host,
            remedy="install TensorRT on the board (JetPack: apt install tensorrt; elsewhere: pip install tensorrt), "
            "or put trtexec on the PATH of ssh",
        )
    version = re.search(r"\[TensorRT v([0-9]{4,6})\]", parts.get("help", "")) if trtexec else None
    if version is None and trtexec:
        raise TargetError(
            f"{trtexec} does not tell its version", where=board.host, remedy="check that it starts there: trtexec --help"
        )
    model = parts.get("model") or None
    mode = re.search(r"NV Power Mode: ?(\S+)", parts.get("nvpmodel", ""))
    free = parts.get("free", "")
    return Probe(
        model=model,
        device=identify(model) if model else None,
        trtexec=trtexec or None,
        version=_dotted(version[1]) if version else (module[1] if module else ""),
        power_mode=mode_name(mode[1]) if mode else None,
        clocks=parts.get("clocks") or None,
        flags=frozenset(re.findall(r"--[A-Za-z]\w*", parts.get("help", ""))) if trtexec else frozenset(trt_builder.TAKES),
        tegrastats=bool(parts.get("tegrastats")),
        free_bytes=int(free) * 1024 if re.fullmatch(r"[0-9]{1,15}", free) else None,
    )


def _dotted(digits: str) -> str:
    if len(digits) == 6:
        return f"{int(digits[:2])}.{int(digits[2:4])}.{int(digits[4:])}"
    return f"{digits[0]}.{digits[1]}.{int(digits[2:])}"
