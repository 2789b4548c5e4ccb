"""``build.sh``: what to run on a board to build and time the engine of an exported network."""

from __future__ import annotations

from pathlib import PurePosixPath

from edge_targets.device import Precision, Target
from edge_targets.tensorrt_versions import parse_version
from edge_targets.trtexec import BuildOptions, InputShapes, TimingOptions, build_command, quoted, timing_command
from rescompress.core.errors import TargetError


def build_script(target: Target, precision: Precision, *, onnx: str = "model.onnx", shapes: InputShapes | None = None) -> str:
    """Return a POSIX shell script that builds the engine with the board's trtexec and times it.

    Args:
        target: A board with TensorRT.
        precision: What the network computes in.
        onnx: Name of the ONNX file beside the script.
        shapes: Profile of a dynamic batch.

    Raises:
        TargetError: The target has no TensorRT.
    """
    if target.tensorrt_version is None:
        raise TargetError(f"{target.name} has no TensorRT", remedy="name a Jetson")
    major, minor = parse_version(target.tensorrt_version)
    engine = str(PurePosixPath(onnx).with_suffix(".engine"))
    build = build_command(
        target.tensorrt_version, onnx, engine, BuildOptions(precision=precision, shapes=shapes), executable="$TRTEXEC"
    )
    timing = timing_command(
        target.tensorrt_version, engine, TimingOptions(shapes=shapes), executable="$TRTEXEC", times="times.json"
    )
    return "\n".join(
        [
            "#!/bin/sh",
            f"# Builds and times {onnx} in {precision} on the {target.device.title}",
            f"# (JetPack {target.jetpack}, TensorRT {target.tensorrt_version}). Run it on the board, in this folder.",
            "# For steady clocks first: sudo nvpmodel -m 0 && sudo jetson_clocks",
            "set -eu",
            'cd "$(dirname "$0")"',
            "TRTEXEC=$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)",
            '[ -x "$TRTEXEC" ] || { echo "trtexec is not here: install TensorRT of JetPack" >&2; exit 4; }',
            f"WANTED={major}.{minor}",
            'DIGITS=$("$TRTEXEC" --help 2>&1 | sed -n "s/.*\\[TensorRT v\\([0-9]*\\)\\].*/\\1/p" | head -n 1)',
            "case $DIGITS in",
            '  ??????) HERE=$(echo "$DIGITS" | sed "s/^\\(..\\)0*\\([0-9][0-9]*\\)..$/\\1.\\2/") ;;',
            '  *) HERE=$(echo "$DIGITS" | sed "s/^\\(.\\)\\(.\\).*/\\1.\\2/") ;;',
            "esac",
            'if [ "$HERE" != "$WANTED" ] && [ -z "${ANY_TENSORRT:-}" ]; then',
            '  echo "this script is for TensorRT $WANTED, here is ${HERE:-unknown}: export again for this board," >&2',
            '  echo "or run with ANY_TENSORRT=1 to try its flags" >&2',
            "  exit 5",
            "fi",
            _line(build),
            f'printf \'{{"tensorrt": "%s"}}\\n\' "$HERE" > {engine}.json',
            _line(timing),
            "",
        ]
    )


def _line(command: list[str]) -> str:
    executable, *rest = command
    return f'"{executable}" {quoted(rest)}'
