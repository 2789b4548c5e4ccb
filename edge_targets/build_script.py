"""``build.sh``: what to run on a board to build and time the engine of an exported network."""

from __future__ import annotations

from pathlib import PurePosixPath

from edge_targets.device import Precision, Target
from edge_targets.tensorrt_versions import parse_version
from edge_targets.trtexec import BuildOptions, InputShapes, TimingOptions, build_command, quoted, timing_command
from rescompress.core.errors import TargetError


def build_script(target: Target, precision: Precision, *, onnx: str = "model.onnx", shapes: InputShapes | None = None) -> str:
    """Return a POSIX shell script that builds the engine, with the board's trtexec or trt_builder.py, and times it.

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
        target.tensorrt_version, onnx, engine, BuildOptions(precision=precision, shapes=shapes), executable="tool"
    )
    timing = timing_command(
        target.tensorrt_version, engine, TimingOptions(shapes=shapes), executable="tool", times="times.json"
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
            'if [ -x "$TRTEXEC" ]; then',
            '  tool() { "$TRTEXEC" "$@"; }',
            "elif python3 -c 'import tensorrt; tensorrt.Builder' 2> /dev/null; then",
            '  echo "trtexec is not here; trt_builder.py builds and times through the Python module of TensorRT"',
            '  tool() { python3 trt_builder.py "$@" --check; }',
            "else",
            '  echo "trtexec is not here, nor the Python module of TensorRT: install TensorRT of JetPack" >&2',
            "  exit 4",
            "fi",
            f"WANTED={major}.{minor}",
            'DIGITS=$(tool --help 2>&1 | sed -n "s/.*\\[TensorRT v\\([0-9]*\\)\\].*/\\1/p" | head -n 1)',
            "case $DIGITS in",
            '  ??????) HERE=$(echo "$DIGITS" | sed "s/^\\(..\\)0*\\([0-9][0-9]*\\)..$/\\1.\\2/") ;;',
            '  *) HERE=$(echo "$DIGITS" | sed "s/^\\(.\\)\\(.\\).*/\\1.\\2/") ;;',
            "esac",
            'if [ "$HERE" != "$WANTED" ] && [ -z "${ANY_TENSORRT:-}" ]; then',
            '  echo "this script is for TensorRT $WANTED, here is ${HERE:-unknown}: export again for this board," >&2',
            '  echo "or run with ANY_TENSORRT=1 to try its flags" >&2',
            "  exit 5",
            "fi",
            f"rm -f {engine} {engine}.json",
            'echo "building, which takes minutes; what the builder says goes to build.log"',
            f"{_line(build)} > build.log 2>&1 || {{",
            "  tail -n 20 build.log >&2",
            '  echo "the build failed, see build.log" >&2',
            "  exit 7",
            "}",
            "# An engine runs on the GPU and the TensorRT it was built with; infer.py reads here which ones these were.",
            'GPU=$(sed -n "s/.*Compute Capability: *\\([0-9.]*\\).*/\\1/p" build.log | head -n 1)',
            "MODEL=${DEVICE_TREE_MODEL:-/proc/device-tree/model}",
            'BOARD=$(if [ -r "$MODEL" ]; then tr -d \'\\000\\012\\042\\134\' < "$MODEL"; fi)',
            'printf \'{"tensorrt": "%s", "compute_capability": "%s", "board": "%s"}\\n\' "$HERE" "$GPU" "$BOARD" '
            f"> {engine}.json",
            *_gpu_check(target),
            _line(timing),
            "",
        ]
    )


def _gpu_check(target: Target) -> list[str]:
    """Return lines that say so where the GPU is not the one the file was exported for."""
    wanted = target.device.compute_capability
    if wanted is None:
        return []
    return [
        f'if [ -n "$GPU" ] && [ "$GPU" != "{wanted}" ]; then',
        f'  echo "note: exported for a GPU of compute capability {wanted}, built here for $GPU (${{BOARD:-no name}}):" >&2',
        '  echo "the engine runs on this GPU only, and the predicted latency is not the one of this board" >&2',
        "fi",
    ]


def _line(command: list[str]) -> str:
    executable, *rest = command
    return f"{executable} {quoted(rest)}"
