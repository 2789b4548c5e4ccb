"""The root command: a table of commands that are imported only when one of them runs, and errors to exit codes."""

from __future__ import annotations

import importlib
import io
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rescompress.cli.output import Output, guarded
from rescompress.cli.siblings import check_siblings

COMPRESS = "Compress"
DEPLOY = "Deploy"
MEASURE = "Measure"
DECIDE = "Decide"
KNOW = "Look up"

RESUMED = frozenset({"prune", "finetune", "quantize", "export", "run", "demo", "search"})
"""Commands that keep what they have done, so that a second call goes on."""

COMMANDS: dict[str, tuple[str, str, str]] = {
    # name: (module below rescompress.cli, panel, one line of help)
    "run": ("run", COMPRESS, "Take a checkpoint through every stage of a config; resumes."),
    "prune": ("compress", COMPRESS, "Remove channels and let the rest make up for them."),
    "finetune": ("compress", COMPRESS, "Train a pruned network back, distilled from its teacher."),
    "quantize": ("compress", COMPRESS, "Quantize to INT8: calibrate, or train with the rounding in place."),
    "sensitivity": ("sensitivity", COMPRESS, "How sensitive each group of channels is to pruning."),
    "search": ("search", COMPRESS, "Many configs instead of one: the front of accuracy, latency and size."),
    "init": ("run", COMPRESS, "Write a commented config for a checkpoint."),
    "demo": ("demo", COMPRESS, "The run that comes with the package, and its page."),
    "export": ("export", DEPLOY, "Write ONNX for a target, check it, build and measure or predict."),
    "deploy": ("deploy", DEPLOY, "Build and measure on the board over SSH; bring engine and timings back."),
    "lint": ("lint", DEPLOY, "Will this ONNX file run well on that target? Traps and repairs."),
    "evaluate": ("export", MEASURE, "Top-1 and top-5 of a checkpoint or an ONNX file."),
    "bench": ("bench", MEASURE, "Measured latency of ONNX files on what is here."),
    "predict": ("targets", MEASURE, "Predicted latency on a device that is not here, with an error band."),
    "compare": ("compare", DECIDE, "Stages of one run, or runs side by side: accuracy, latency, size, MACs."),
    "report": ("report", DECIDE, "One HTML page: the trade-off, charts, widths, time per layer; a model card."),
    "gate": ("gate", DECIDE, "Compare a run with a baseline and fail when it lost too much."),
    "inspect": ("inspect", KNOW, "What a checkpoint is: architecture, format, layers, prunable groups."),
    "formats": ("inspect", KNOW, "Checkpoint formats and architectures known here."),
    "targets": ("targets", KNOW, "Edge targets known here: devices, runtimes, precisions, power modes."),
    "methods": ("sensitivity", KNOW, "Pruning methods known here."),
    "doctor": ("doctor", KNOW, "What is installed, and what each missing piece would enable."),
    "schema": ("schema", KNOW, "JSON Schemas of what commands print, and of files."),
}
"""Every command; a group of related commands shares one module, whose `app` holds them by the same names."""


_OF_THE_SHELL = frozenset({"install_completion", "show_completion"})
"""Options that typer gives every app; they are the root command's alone."""


class LazyGroup(TyperGroup):
    """A group whose commands are stubs (name and one line) until one is resolved; then its module is imported."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the named command, built from its module."""
        name, stub, rest = super().resolve_command(ctx, args)
        if name not in COMMANDS:
            return name, stub, rest
        if name != "doctor":  # which tells the whole story
            check_siblings()
        if COMMANDS[name][1] == COMPRESS or name in ("evaluate", "inspect", "export"):
            _hint_at_little_memory(ctx.obj)
        module = importlib.import_module(f"rescompress.cli.{COMMANDS[name][0]}")
        built = typer.main.get_command(module.app)
        command = getattr(built, "commands", {}).get(name, built)
        command.params = [p for p in command.params if p.name not in _OF_THE_SHELL] + common_params()
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an interrupt ends with 130, as shells expect."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            output: Output = ctx.obj
            resumes = ctx.invoked_subcommand in RESUMED
            output.hint("interrupted; the same command goes on where it was" if resumes else "interrupted")
            sys.exit(130)


_MEMORY_OF_TORCH = 4 << 30


def _hint_at_little_memory(output: Output) -> None:
    """Say that the address space is small before torch is loaded: where it does not suffice, torch may end the process."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit < _MEMORY_OF_TORCH:
        output.hint(f"the memory of this process is limited to {limit / 2**30:.1f} GiB (ulimit -v), which torch may exceed")


def _set_json(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.obj.json = True


def _set_verbose(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.obj.verbosity = 1


def _set_quiet(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.obj.verbosity = -1


def _set_debug(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.obj.debug = True


def _add_devices(paths: list[Path] | None) -> None:
    for path in paths or ():
        from edge_targets.catalog import add_device_file

        add_device_file(path)


def common_params() -> list[Any]:
    """Return the options that every command takes."""
    return list(typer.main.get_command(_common_app()).params)


def _common_app() -> typer.Typer:
    """Return an app whose one command carries the options that every command takes."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def common(
        json: Annotated[
            bool,
            typer.Option("--json", help="One JSON document.", callback=_set_json, is_eager=True, expose_value=False),
        ] = False,
        verbose: Annotated[
            bool,
            typer.Option(
                "--verbose",
                "-v",
                help="Time and memory at the end; compare, inspect: every column and layer.",
                callback=_set_verbose,
                is_eager=True,
                expose_value=False,
            ),
        ] = False,
        quiet: Annotated[
            bool,
            typer.Option("--quiet", "-q", help="No progress.", callback=_set_quiet, is_eager=True, expose_value=False),
        ] = False,
        device_file: Annotated[
            list[Path] | None,
            typer.Option(
                "--device-file",
                metavar="FILE.yaml",
                help="A device of your own as a target; repeatable.",
                callback=_add_devices,
                is_eager=True,
                expose_value=False,
                show_default=False,
                rich_help_panel="Computation",
            ),
        ] = None,
        debug: Annotated[
            bool, typer.Option("--debug", help="Show tracebacks.", callback=_set_debug, is_eager=True, expose_value=False)
        ] = False,
    ) -> None:
        """Hold the common options."""

    return app


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"rescompress {version('rescompress')}")
        raise typer.Exit


def _build(output: Output) -> typer.Typer:
    app = typer.Typer(
        name="rescompress",
        cls=LazyGroup,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "obj": output},
        epilog="Start with [bold]rescompress inspect CKPT[/bold], or write a config with [bold]rescompress init[/bold].",
    )

    @app.callback()
    def root(
        version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)] = False,
    ) -> None:
        """Make a trained ResNet small and fast on an edge device: prune, quantize, export, measure."""

    for name, (_, panel, text) in COMMANDS.items():
        app.command(name, help=text, rich_help_panel=panel)(_stub)
    return app


def _stub() -> None:
    """Stand in for a command until it is resolved."""


def main() -> None:
    """Run the command line; every error of ours ends with its exit code and one clear message."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    output = Output()
    begin = time.monotonic()
    with guarded():
        try:
            _build(output)()
        except KeyboardInterrupt:
            output.hint("interrupted")
            sys.exit(130)
        except Exception as e:
            sys.exit(output.failure(e))
        finally:
            output.detail(_spent(time.monotonic() - begin))


def _spent(seconds: float) -> str:
    """Return what a command took, in words."""
    words = f"took {seconds:.1f} s"
    try:
        import resource
    except ModuleNotFoundError:  # Windows has none
        return words
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage tells bytes there, KiB elsewhere
    return f"{words}, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB of memory"


if __name__ == "__main__":
    main()
