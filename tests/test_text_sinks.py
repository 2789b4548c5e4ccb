"""Text from files at every place it goes to: no control character, CI command, markup, formula or link comes out of a name."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from command_line import run_command
from hypothesis import example, given, settings
from hypothesis import strategies as st
from report_factory import write_run

from rescompress.cli.output import Output, guarded
from rescompress.cli.workspace import peers
from rescompress.core.errors import BadInput
from rescompress.core.manifest import Manifest, StageResult, json_of, load_manifest
from rescompress.core.text import code_span, log_line, markdown, one_line, shown, spreadsheet_cell, xml_text
from rescompress.show.report.html import page

HOSTILE = (
    "\x1b]0;OWNED\x07\x1b[2J\x1b]52;c;cHdu\x07\x9b31m\u202egnp.exe\u200b\u2066\ufeff\x7f\r\n::error file=a::pwned\n"
    " ::set-output name=verdict::pass\r::add-mask::e\n##[error]x [bold]y[/bold] [/nope] :smile: "
    "![x](http://evil.example/t.png) [c](javascript:alert(1)) @everyone #12 `a` | b\n# HEAD\n- item\n<script>alert(1)</script>"
)
any_text = st.text(st.characters(), max_size=40) | st.lists(
    st.sampled_from(["\x1b[31m", "::error::", "##[group]", "\n", "\r", "\u202e", "=1+1", "@a", "[/x]", "<b>", "\ud800", "a"])
).map("".join)


def harmless(text: str) -> bool:
    """Whether neither a terminal nor the runner of a CI system obeys anything in it."""
    odd = [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t\u200c\u200d"]
    return not odd and "##[" not in text and not any(line.strip().startswith("::") for line in text.splitlines())


@given(any_text)
@example(HOSTILE)
def test_what_is_shown_is_harmless_and_plain_text_stays(text: str) -> None:
    assert harmless(log_line(text))
    assert log_line(log_line(text)) == log_line(text)
    assert "\n" not in one_line(text)
    ElementTree.fromstring(f"<a>{xml_text(text).replace('&', '&amp;').replace('<', '&lt;')}</a>".encode())
    if text.isascii() and text.isprintable():
        assert shown(text) == text


@given(st.lists(any_text, min_size=1, max_size=6))
@example(["::", "error::x", "\n", " ", ":", ":warning::", "##", "[x]"])
def test_a_stream_takes_no_command_however_it_is_cut(parts: list[str]) -> None:
    stream = io.StringIO()
    before = sys.stdout
    sys.stdout = stream
    try:
        with guarded():
            for part in parts:
                sys.stdout.write(part)
    finally:
        sys.stdout = before
    assert harmless(stream.getvalue())


@given(any_text)
@example(HOSTILE)
def test_markdown_of_a_text_is_text(text: str) -> None:
    found = markdown(text)
    assert len(found.splitlines()) <= 1
    plain = re.sub(r"\\[\\`*\[\]|$_~]|&#?\w+;", "\0", found)
    assert not re.search(r"[<>`*\[\]|]|@\w|#\d|://", plain), found
    assert not re.match(r"(#{1,6}|[-+]|\d+[.)])(\s|$)", found)
    assert len(code_span(text).splitlines()) == 1
    cell = next(csv.reader(io.StringIO(f'"{spreadsheet_cell(text).replace(chr(34), chr(34) * 2)}",')))[0]
    assert cell.lstrip()[:1] not in {"=", "+", "-", "@"}


def poisoned(value: Any, evil: str, path: tuple[str, ...] = ()) -> Any:
    """Return a manifest's JSON with hostile text behind every free text, in keys, too."""
    if isinstance(value, dict):
        free = bool(path) and path[-1] in ("config", "environment", "widths_before", "widths_after", "curves", "packages")
        return {k + evil if free else k: poisoned(v, evil, (*path, k)) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, evil, path) for v in value]
    kept = ("kind", "path", "status", "provenance", "unit", "sha256", "key", "created", "finished", "config_file")
    if not isinstance(value, str) or path[-1] in kept:
        return value
    return value if value in ("dense", "prune", "finetune", "quantize") else value + evil


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "base")
    write_run(folder / "cand")
    path = folder / "cand" / "manifest.json"
    document = json.loads(path.read_text())
    document["stages"][1]["details"] |= {"curves_unit": "nats", "notes": ["a note"], "kept": "ptq", "arch": "resnet"}
    document["stages"].append({"stage": "target:x", "status": "failed", "reason": "no room"})
    path.write_text(json.dumps(poisoned(document, HOSTILE)))
    return folder


WAYS: dict[str, Callable[[Path], list[object]]] = {
    "table": lambda f: ["compare", f / "cand"],
    "history": lambda f: ["compare", f, "--history"],
    "csv": lambda f: ["compare", f / "cand", "--format", "csv"],
    "md": lambda f: ["compare", f / "cand", "--format", "md"],
    "json": lambda f: ["compare", f / "cand", "--json"],
    "gate": lambda f: ["gate", f / "cand", "-b", f / "base"],
    "gate json": lambda f: ["gate", f / "cand", "-b", f / "base", "--json"],
    "report": lambda f: ["report", f / "cand", "-o", f / "out [bold][/x].html", "--model-card", f / "card.md"],
    "stage": lambda f: ["gate", f / "base", "-b", f / "cand", "--stage", HOSTILE],
    "path": lambda f: ["compare", HOSTILE],
    "sort": lambda f: ["compare", f / "cand", "--sort", HOSTILE],
    "option": lambda f: ["compare", f"--{HOSTILE}"],
    "command": lambda f: [HOSTILE],
    "checkpoint": lambda f: ["inspect", HOSTILE],
    "target": lambda f: ["targets", HOSTILE],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_command_that_prints_a_name_prints_it_harmless(hostile: Path, way: str) -> None:
    done = run_command(*WAYS[way](hostile), COLUMNS="100")
    assert done.returncode in (0, 2, 3, 5, 6), done.stderr
    assert harmless(done.stdout), done.stdout
    assert harmless(done.stderr), done.stderr
    assert "bug of" not in done.stderr
    if "json" in way:
        json.loads(done.stdout)
    if way == "report":
        assert "[bold][/x].html" in done.stdout
        assert harmless((hostile / "card.md").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, ONNX files, pictures and a config whose every free name is hostile."""
    import onnx
    import torch
    from onnx_mutants import originals
    from PIL import Image

    from compress.checkpoints import load_checkpoint

    folder = tmp_path_factory.mktemp("models")
    name = HOSTILE.replace("/", "-")[:100]  # a file's name has no slash, and at most 255 bytes
    checkpoint = load_checkpoint(Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors")
    labels = tuple(f"{i}{name}" for i in range(10))
    state = {**checkpoint.state_dict, f"fc_{HOSTILE}.weight": torch.zeros(3, 64), f"criterion.{HOSTILE}": torch.zeros(3)}
    torch.save({"state_dict": state, "classes": list(labels), HOSTILE: HOSTILE}, folder / "net.pt")
    torch.save({"state_dict": checkpoint.state_dict, "arch": f"resnetblur{HOSTILE}"}, folder / "variant.pt")
    own, _, foreign = originals()
    for model, file in ((own, "own.onnx"), (foreign, "foreign.onnx")):
        renamed = {}
        for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
            renamed[value.name] = value.name = value.name + HOSTILE
        for node in model.graph.node:
            node.name += HOSTILE
            for ends in (node.input, node.output):
                for i, end in enumerate(ends):
                    ends[i] = renamed.setdefault(end, end + HOSTILE) if end else end
        model.producer_name += HOSTILE
        onnx.save(model, folder / file)
    for split in ("train", "val"):
        for label in labels:
            place = folder / "set" / split / label
            place.mkdir(parents=True)
            for i in range(2):
                Image.new("L", (8, 8), i).save(place / f"{i}{name}.png")
    (folder / "set" / "val" / labels[0] / f"odd{name}.gif").write_bytes(b"GIF89a")
    (folder / "flat").mkdir()
    Image.new("L", (8, 8)).save(folder / "flat" / f"{name}.png")
    (folder / "flat" / "labels.csv").write_text(json.dumps(name) + "," + json.dumps(HOSTILE) + "\n")
    (folder / "run.yaml").write_text(json.dumps({"checkpoint": HOSTILE, "data": HOSTILE, HOSTILE: HOSTILE}))
    (folder / "values.yaml").write_text(json.dumps({"checkpoint": "net.pt", "data": HOSTILE, "targets": [HOSTILE]}))
    (folder / f"{name}.onnx").write_bytes(b"no")
    return folder


MODELS: dict[str, list[str]] = {
    "inspect": ["inspect", "net.pt", "--input", "1x8x8"],
    "inspect layers": ["inspect", "net.pt", "-v", "--json"],
    "variant": ["inspect", "variant.pt"],
    "init": ["init", "net.pt", "-o", "made.yaml"],
    "evaluate": ["evaluate", "net.pt", "--data", "set"],
    "labels": ["evaluate", "net.pt", "--data", "set", "--labels", f"{HOSTILE}=0"],
    "label file": ["evaluate", "net.pt", "--data", "flat"],
    "evaluate onnx": ["evaluate", "own.onnx", "--data", "set"],
    "lint": ["lint", "foreign.onnx", "-t", "jetson"],
    "lint own": ["lint", "own.onnx", "-t", "jetson", "--json"],
    "fix": ["lint", "own.onnx", "-t", "jetson", "--fix", "fixed.onnx"],
    "predict": ["predict", "own.onnx", "-t", "jetson", "-v"],
    "predict foreign": ["predict", "foreign.onnx", "-t", "jetson"],
    "bench": ["bench", "own.onnx", "-t", "cpu-ort", "--seconds", "0.2"],
    "run": ["run", "run.yaml"],
    "run values": ["run", "values.yaml", "-o", "made"],
    "set": ["run", "values.yaml", "--set", f"prune.{HOSTILE}={HOSTILE}"],
    "prune": ["prune", "net.pt", "--ratio", "0.3", "--method", "magnitude", "-w", "made2"],
    "sensitivity": ["sensitivity", "net.pt", "--method", "magnitude"],
    "export": ["export", "net.pt", "--target", "jetson-nano", "-o", "bundle"],
    "search": ["search", "values.yaml", "-o", "made3"],
    "deploy": ["deploy", "own.onnx", "--host", HOSTILE, "-t", "jetson"],
    "files": ["lint", "*.onnx", "-t", "jetson"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", MODELS)
def test_names_in_models_and_data_are_printed_harmless(rescompress: Callable[..., Any], models: Path, way: str) -> None:
    words = MODELS[way]
    if way == "files":
        words = [w for word in words for w in (sorted(p.name for p in models.glob(word)) if word == "*.onnx" else [word])]
    done = rescompress(*words, cwd=models, code=None)
    assert done.returncode in (0, 2, 3, 4, 5, 7), done.stderr
    assert harmless(done.stdout), done.stdout
    assert harmless(done.stderr), done.stderr
    assert "bug of" not in done.stderr
    for made in ("made.yaml", "bundle/README.md", "bundle/labels.txt"):
        if (models / made).exists():
            assert harmless((models / made).read_text()), made


@pytest.mark.slow
def test_only_the_annotations_of_the_gate_are_commands(hostile: Path) -> None:
    written = {name: hostile / name for name in ("s.md", "j.xml", "step", "out")}
    done = run_command(
        *("gate", hostile / "cand", "-b", hostile / "base", "--summary", written["s.md"], "--junit", written["j.xml"]),
        GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(written["step"]), GITHUB_OUTPUT=str(written["out"]),
    )  # fmt: skip
    commands = [line for line in done.stderr.splitlines() if line.strip().startswith("::")]
    assert commands
    assert all(re.match(r"::(error|warning|notice) title=rescompress gate", line) for line in commands)
    assert harmless("\n".join(line for line in done.stderr.splitlines() if line not in commands))
    assert re.fullmatch(r"verdict=\w+\n", written["out"].read_text())
    assert harmless(written["s.md"].read_text())
    assert "<script" not in written["s.md"].read_text()
    assert harmless(written["j.xml"].read_text())
    ElementTree.parse(written["j.xml"])


class Outline(HTMLParser):
    """Tags of a page, and the content of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name == "style" for name, _ in attrs)
        if tag in self.inline:
            self.inline[tag].append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in self.inline and self.inline[self.tags[-1]]:
            self.inline[self.tags[-1]][-1] += data if not self.inline[self.tags[-1]][-1] else ""


def test_the_page_runs_its_own_script_alone(hostile: Path) -> None:
    """Every text of a manifest is text, its unit of the curves, too; the policy names the one script by its hash."""
    manifest = load_manifest(hostile / "cand")
    text = page([("cand", manifest)])
    found = Outline(text)
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert "alert(1)" not in found.inline["script"][0]
    assert "What it costs (nats" in text
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "unsafe-inline" not in policy
    for kind in ("script", "style"):
        content = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy.replace("&#39;", "'")
    assert harmless(text.replace("::", "").replace("##[", ""))


def test_brackets_of_a_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(title="[red]t[/red]")
    table.add_column("[bold]c", min_width=40)
    table.add_row("[/nope] :smile: \x1b[31m")
    Output().result({}, "[bold]x[/bold] [/y]", table)
    out = capsys.readouterr().out
    assert all(text in out for text in ("[bold]x[/bold] [/y]", "[red]t[/red]", "[bold]c", "[/nope] :smile: \\x1b[31m"))


def test_a_document_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.json = True
    with guarded():
        output.result({HOSTILE: [HOSTILE, "\x7f"]})
    out = capsys.readouterr().out
    assert harmless(out)
    assert json.loads(out) == {HOSTILE: [HOSTILE, "\x7f"]}


def test_an_error_of_any_length_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    Output().failure(ValueError("x" * 100_000))
    assert len(capsys.readouterr().err) < 5000


odd = st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.lists(st.integers(), max_size=2)


def manifest_with(change: tuple[int, str, Any]) -> Manifest | None:
    """Return a run of which one value is another; None where no manifest can hold it."""
    position, key, value = change
    document = json.loads(BASE.model_dump_json())
    stage = document["stages"][position % len(document["stages"])]
    part, _, name = key.partition(".")
    if name:
        stage.setdefault(part, {})[name] = value
    else:
        stage[part] = value
    try:
        return Manifest.model_validate(document)
    except ValueError:
        return None


keys = st.sampled_from(
    [f"details.{k}" for k in ("notes", "kept", "latency_runs", "curves", "layers", "epochs", "widths_before", "arch",
                              "precision", "engine_status", "curves_unit", "dropped_blocks")] + ["reason", "stage", "finished"]
)  # fmt: skip
BASE = Manifest()


@pytest.fixture(scope="module", autouse=True)
def _base(tmp_path_factory: pytest.TempPathFactory) -> None:
    global BASE
    BASE = write_run(tmp_path_factory.mktemp("base"))


def check_views(change: tuple[int, str, Any]) -> None:
    from rescompress.show.figures import tables
    from rescompress.show.report import history
    from rescompress.show.report.card import model_card

    manifest = manifest_with(change)
    if manifest is not None:
        rows = tables.rows_of(manifest, "r")
        for text in (tables.to_csv(rows), tables.to_markdown(rows, wide=True), model_card("r", manifest)):
            assert harmless(log_line(text))
        history.trends([tables.run_row(manifest, "r"), tables.run_row(BASE, "b")])
        page([("r", manifest), ("b", BASE)], history=True)


@given(st.tuples(st.integers(0, 7), keys, odd))
@example((3, "details.kept", "ptq"))
@settings(max_examples=12, deadline=None)
def test_odd_values_break_no_view(change: tuple[int, str, Any]) -> None:
    check_views(change)


@pytest.mark.slow
@given(st.tuples(st.integers(0, 7), keys, odd))
@settings(max_examples=300, deadline=None)
def test_many_odd_values_break_no_view(change: tuple[int, str, Any]) -> None:
    check_views(change)


def test_the_command_line_never_prints_past_its_sink() -> None:
    """A new command must not write to the streams itself."""
    root = Path(__file__).parents[1] / "rescompress"
    found = subprocess.run(
        ["grep", "-rnE", r"sys\.std(out|err)\.write|\bprint\(|typer\.echo", str(root), "--include=*.py"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    outside = {Path(line.split(":")[0]).relative_to(root).as_posix() for line in found.splitlines()}
    assert outside <= {"cli/output.py", "cli/progress.py", "cli/app.py", "__main__.py"}


@pytest.mark.parametrize("name", ["\udcc3\udcbc", "h\udcfcnd", "\ud800", "ü \udcff"])
def test_names_that_are_no_utf8_are_kept_in_records(name: str, tmp_path: Path) -> None:
    stage = StageResult(stage="prune", status="done", details={"plan": [name], "counts": {name: 1}})
    manifest = Manifest(stages=(stage,), config={"data": name}, config_file=name)
    manifest.save(tmp_path)
    again = load_manifest(tmp_path)
    assert again.config["data"] == again.config_file == again.stages[0].details.document()["plan"][0]
    assert json.loads(json_of(stage))["details"].keys() == again.stages[0].details.document().keys()
    if name == "\udcc3\udcbc":  # what an ASCII locale makes of two bytes of UTF-8
        assert again.config_file == "ü"


@pytest.mark.parametrize("variables", [{"COLUMNS": "²"}, {"LINES": "³"}])
def test_digits_that_are_no_numbers_end_no_command(variables: dict[str, str]) -> None:
    run_command("targets", code=0, **variables)


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("abc", "²", "-1", "1.5"):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        with pytest.raises(BadInput, match="number of processes"):
            peers()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert peers() is None
