"""``search``: from one config to a front of networks, by any number of workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rescompress.cli import options as opt
from rescompress.cli.output import Output, output_of

if TYPE_CHECKING:
    from rescompress.search.study import Trials

START = "start"
STORAGE = "RESCOMPRESS_STORAGE"
"""Environment variable with the address of a storage: a command line, with a password in it, is for all to read."""


class SearchGroup(TyperGroup):
    """A group whose first word may be a config: ``search CONFIG.yaml`` begins or goes on with a search."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the hidden command ``start`` before what is no sub-command."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [START, *args]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the named command with the options that every command takes."""
        from rescompress.cli.app import common_params

        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            command.params.extend(common_params())
        return name, command, rest


app = typer.Typer(cls=SearchGroup, no_args_is_help=True, add_completion=False)

Where = Annotated[
    str,
    typer.Argument(
        metavar="DIR|URL", envvar=STORAGE, help="Folder of the search, or the URL of its storage.", show_default=False
    ),
]
Name = Annotated[str | None, typer.Option("--name", help="Of the search, where a storage holds several.", show_default=False)]

Conclude = Annotated[
    bool,
    typer.Option(
        "--conclude", help="At the end, read the evaluation split for the front as it is then, also where candidates are left."
    ),
]


@app.callback(epilog="Example: rescompress search examples/search_digits.yaml --trials 30")
def search() -> None:
    """Find the networks that are worth having for a board, by trying many configs.

    `rescompress search CONFIG.yaml` begins or goes on with a search; `rescompress search start --help` shows its options.
    """


@app.command(START)
def start(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings of the run.", show_default=False)],
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Candidates.", show_default="the config's")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Its folder.", show_default="rescompress-out/<config>-search"),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            envvar=STORAGE,
            help="A database instead of a file, for many machines.",
            show_default=False,
        ),
    ] = None,
    name: Name = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Workers on this machine.")] = 1,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.0, help="Begin no candidate after so long.", show_default=False)
    ] = None,
    conclude: Conclude = False,
    overrides: opt.Overrides = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    batch_size: opt.BatchSize = None,
) -> None:
    """Begin a search or go on with it; the word `start` may be left out.

    Example: rescompress search examples/search_digits.yaml --trials 30 --jobs 2
    """
    from rescompress.core.artifact import make_folder
    from rescompress.core.errors import ConfigError
    from rescompress.runs.config import load_config
    from rescompress.runs.search_settings import SearchConfig, default_space, planned
    from rescompress.search.study import create, storage_of
    from rescompress.search.worker import check_candidates, check_space, own_folder

    out = output_of(ctx)
    loaded = load_config(config, tuple(overrides or ()))
    section = loaded.search or SearchConfig()
    if trials is not None:
        section = section.model_copy(update={"trials": trials})
    document = loaded.model_dump(mode="json")
    space = section.space or default_space(document)
    document["search"] = section.model_copy(update={"space": space}).model_dump(mode="json")
    check_space(document)  # an unknown word is named before the candidates are counted
    try:
        queue, anchored, total = planned(document, space, section.trials)
    except ValueError as e:
        raise ConfigError(str(e), where="search.space", remedy="give one a second choice, or use `rescompress run`") from e
    if total < section.trials:
        out.hint(f"note: the space holds {total} candidates: each is tried once, in the place of {section.trials}")
        document["search"]["trials"] = total
    check_candidates(document, queue)
    folder = (output or Path("rescompress-out") / f"{config.stem}-search").resolve()
    make_folder(folder)
    address = storage or str(folder)
    own_folder(folder, name or config.stem, storage, mark=False)
    try:
        begun = create(storage_of(address), name or config.stem, document, loaded.seed, queue, anchored=anchored)
    except ValueError as e:
        raise ConfigError(str(e), where="search.space", remedy="compare with docs/search.md") from e
    own_folder(folder, name or config.stem, storage)
    begun.stop(False)
    _work(out, begun, folder, jobs, minutes, conclude, device, threads, batch_size, address, name or config.stem)
    _show_front(out, begun, folder)


@app.command()
def worker(
    ctx: typer.Context,
    where: Where,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the runs.", show_default="rescompress-out/<name>"),
    ] = None,
    name: Name = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Workers on this machine.")] = 1,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.0, help="Begin no candidate after so long.", show_default=False)
    ] = None,
    conclude: Conclude = False,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    batch_size: opt.BatchSize = None,
) -> None:
    """One more pair of hands for a search, on this machine or another.

    Example: rescompress search worker postgresql://me@host/searches
    """
    out = output_of(ctx)
    joined = _join(where, name)
    folder = (output or _folder_of(where, joined)).resolve()
    from rescompress.search.worker import own_folder

    own_folder(folder, joined.study.study_name, where if "://" in where else None)
    tally = _work(out, joined, folder, jobs, minutes, conclude, device, threads, batch_size, where, joined.study.study_name)
    out.result({"finished": tally}, ", ".join(f"{n} {state}" for state, n in tally.items()) or "nothing left to do")


@app.command()
def status(ctx: typer.Context, where: Where, name: Name = None) -> None:
    """How far a search is, who works on it, and what its rungs were worth.

    Example: rescompress search status rescompress-out/quickstart-search
    """
    from rescompress.search.show import status_document, status_table

    out = output_of(ctx)
    document = status_document(_join(where, name))
    out.result(document, *status_table(document))


@app.command()
def front(ctx: typer.Context, where: Where, name: Name = None) -> None:
    """The networks of which none is surely beaten, with accuracy, cost and error.

    Example: rescompress search front rescompress-out/quickstart-search --json
    """
    out = output_of(ctx)
    _show_front(out, _join(where, name), None)


@app.command()
def best(
    ctx: typer.Context,
    where: Where,
    max_drop: Annotated[
        float, typer.Option("--max-drop", min=0.0, max=100.0, help="Points of accuracy that may be lost, at 95 %.")
    ] = 1.0,
    by: Annotated[str | None, typer.Option("--by", help="The cost to make least.", show_default="the first objective")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Checkpoint to write.", show_default=False)] = None,
    name: Name = None,
) -> None:
    """The cheapest network that is not worse than the dense one by more than a margin.

    Example: rescompress search best DIR --max-drop 1.0 -o best.safetensors
    """
    from rescompress.search.show import best_document

    out = output_of(ctx)
    joined = _join(where, name)
    document = best_document(joined, max_drop / 100, by)
    if output is not None:
        from rescompress.search.show import deliver_best

        document["output"] = str(deliver_best(document, output))
    out.result(document, document["words"])


@app.command()
def stop(ctx: typer.Context, where: Where, name: Name = None) -> None:
    """Ask all workers to stop after the rung they are at; `search CONFIG` or `worker` goes on.

    Example: rescompress search stop rescompress-out/quickstart-search
    """
    out = output_of(ctx)
    _join(where, name).stop(True)
    out.result({"stopping": True}, "asked to stop: every worker ends after the rung it is at")


def _join(where: str, name: str | None) -> Trials:
    from rescompress.core.errors import BadInput
    from rescompress.search.study import JOURNAL, join, storage_of

    if "://" not in where and not (Path(where) / JOURNAL).is_file():
        raise BadInput("holds no search", where=where, remedy="name the folder of one, or begin one with `rescompress search`")
    return join(storage_of(where), name, seed=int.from_bytes(os.urandom(4), "big"), where=where)


def _folder_of(where: str, joined: Trials) -> Path:
    return Path(where) if "://" not in where else Path("rescompress-out") / f"{joined.study.study_name}-search"


def _work(
    out: Output,
    trials: Trials,
    folder: Path,
    jobs: int,
    minutes: float | None,
    now: bool,
    device: str,
    threads: int | None,
    batch_size: int | None,
    address: str,
    name: str,
) -> dict[str, int]:
    """Work on a search with one or more processes, and conclude it when nothing is left, or at the end if asked `now`."""
    from rescompress.cli.progress import reporting
    from rescompress.core.artifact import make_folder
    from rescompress.runs.store import Store
    from rescompress.search.worker import Pipeline, agree, conclude, settings_of, work

    make_folder(folder)
    until = time.monotonic() + 60 * minutes if minutes is not None else None
    cores = os.cpu_count() or 1
    if jobs > 1:
        threads = threads or max(1, cores // jobs)
        if jobs >= cores:
            out.hint(f"note: {jobs} jobs on {cores} cores share them: more candidates at once, none of them faster")
    settings = settings_of(trials.document, device=device, threads=threads, batch_size=batch_size)
    agree(trials, Pipeline(trials.document, settings, Store(folder / "store")))
    words, variables = helper_of(address, folder, name, threads, device, minutes, batch_size)
    helpers = [subprocess.Popen(words, stdout=subprocess.DEVNULL, env=variables) for _ in range(jobs - 1)]
    try:
        with reporting(out) as reporter:
            pipeline = Pipeline(trials.document, settings, Store(folder / "store"), reporter)
            tally = work(trials, pipeline, folder / "trials", told=reporter.note, until=until)
            if failed := sum(helper.wait() != 0 for helper in helpers):
                reporter.note(f"{failed} of {jobs} workers ended with an error; the others did their candidates")
            left = sum(not t.finished for t in trials.all())
            if left and not now:
                reporter.note(f"{left} candidates are left: the same command goes on; with --conclude it judges what there is")
            else:
                conclude(trials, pipeline, folder / "trials", told=reporter.note)
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.terminate()
    return tally.finished


def helper_of(
    address: str,
    folder: Path,
    name: str,
    threads: int | None,
    device: str,
    minutes: float | None,
    batch_size: int | None,
) -> tuple[list[str], dict[str, str]]:
    """Return the command of one more worker, and its environment, which holds the address: others can read a command."""
    words = [sys.executable, "-P", "-m", "rescompress", "search", "worker", "-o", str(folder), "--name", name, "-q"]
    given = {"--threads": threads, "--device": device, "--minutes": minutes, "--batch-size": batch_size}
    words += [word for option, value in given.items() if value is not None for word in (option, str(value))]
    return words, {**os.environ, STORAGE: address}


def _show_front(out: Output, trials: Trials, folder: Path | None) -> None:
    from rescompress.search.show import front_document, front_table

    document = front_document(trials)
    if folder is not None:
        document["folder"] = str(folder)
    if not document["front"]:
        out.hint("note: no candidate has reached the top of the ladder yet")
    out.result(document, front_table(document))
