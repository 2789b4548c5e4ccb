"""The HTML report: its text, its accessibility, and how a real browser takes it."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import chromium
import pytest
from command_line import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from report_factory import latency, write_run

from rescompress.core.manifest import Manifest, StageResult, load_manifest
from rescompress.core.metric import accuracy, counted
from rescompress.show.figures.tables import rows_of, run_row, to_markdown
from rescompress.show.gate import GateReport, render
from rescompress.show.report import charts
from rescompress.show.report.card import model_card
from rescompress.show.report.charts import Axis, Point, scatter, ticks
from rescompress.show.report.html import _step, page

VOID = {"meta", "link", "br", "hr", "img", "input"}
SVG_LEAVES = {"line", "path", "circle", "rect"}


class Outline(HTMLParser):
    """Checks that tags close in order, and collects what the accessibility tests look at."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> in the wrong place"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_says_what_the_network_is_and_on_what_it_was_measured(tmp_path: Path) -> None:
    manifest = write_run(tmp_path, n=360)
    config = {"data": "/home/someone/photos", "prune": {"macs": 0.5, "ratio": None, "keep": []}}
    text = " ".join(outline(page([("a", manifest.model_copy(update={"config": config}))])).text)
    assert re.search(r"A \S+ for image classification, pruned", text)
    assert "Accuracies are those of 360 images of photos." in text
    shown = text[: text.index("The whole manifest")]
    assert "/home/someone" not in shown
    assert "ratio: None" not in shown


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "resnet32"
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return page([("resnet32", load_manifest(run))])


def test_page_is_well_formed_and_says_everything(text: str, run: Path) -> None:
    found = outline(text)
    words = " ".join(found.text)
    for section in ("trade-off", "charts", "widths", "curves", "layers", "training", "environment", "manifest"):
        assert section in found.ids
    for figure in (
        "88.00 ± 1.03 %",
        "34.0 M",
        "260 kB",
        "1.20 ms",
        "predicted",
        "measured",
        "skipped: tensorrt_rtx is not installed",
    ):
        assert figure in words
    assert "no TensorRT here; build script written" in words
    assert load_manifest(run).stages[0].outputs[0].sha256 in words


def test_page_has_text_for_everything_drawn(text: str) -> None:
    found = outline(text)
    assert len(found.ids) == len(set(found.ids))
    drawings = [attrs for tag, attrs in found.elements if tag == "svg"]
    assert len(drawings) > 15
    for attrs in drawings:
        assert attrs["role"] == "img"
        assert all(name in found.ids for name in str(attrs["aria-labelledby"]).split())
    assert [tag for tag, _ in found.elements].count("h1") == 1
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert ("html", {"lang": "en"}) in found.elements
    for tag, attrs in found.elements:
        if tag == "th":
            assert attrs.get("scope") in ("col", "row")
        if tag == "a":
            assert str(attrs["href"]).removeprefix("#") in found.ids
        if "scroll" in (attrs.get("class") or "").split():
            assert attrs["tabindex"] == "0"
            assert attrs["aria-label"]
    figures = sum(tag == "figure" for tag, _ in found.elements)
    assert sum(tag == "details" for tag, _ in found.elements) >= figures, "each chart has its figures as a table"


def test_page_names_nothing_outside_itself(text: str) -> None:
    for tag, attrs in outline(text).elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert "url(" not in text
    assert "@import" not in text


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_have_contrast_in_both_themes(text: str) -> None:
    """WCAG 2.2, AA: 4.5 for text, 3 for what charts draw with."""
    themes = [dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block)) for block in re.findall(r"\{([^{}]*--bg:[^{}]*)\}", text)]
    assert len(themes) == 3
    for theme in themes:
        for ground in ("bg", "surface"):
            for ink in ("text", "muted", "accent", "good", "bad", "warn"):
                assert _contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground, theme)
        assert _contrast(theme["before"], theme["bg"]) >= 3


awkward = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=30)


@given(name=awkward, stage=awkward, reason=awkward, key=awkward)
@settings(max_examples=40, deadline=None)
def test_any_name_is_text_never_markup(name: str, stage: str, reason: str, key: str) -> None:
    manifest = Manifest(
        config={key: {"<script>alert(1)</script>": key}},
        stages=(
            StageResult(stage=f"{stage}<b>", status="failed", reason=f"</script><img src=x onerror=y> {reason}"),
            StageResult(
                stage="target:a'\"&", status="done", metrics={"p50_ms": latency(1.0, device=reason)},
                details={"layers": [{"name": f"<i>{name}", "ms": 1.0}], "widths_before": {key: 4}, "widths_after": {key: 2},
                         "curves": {key: {"error": [0.0, 0.1, 0.2, 0.3, 0.4]}}},
            ),
        ),
    )  # fmt: skip
    for runs in ([(name, manifest)], [(name, manifest), (f"{name}2", manifest)]):
        found = outline(page(runs, history=len(runs) > 1))
        tags = {tag for tag, _ in found.elements}
        assert not tags & {"img", "i", "b"}
        assert [tag for tag, _ in found.elements].count("script") == 1


def test_the_page_tells_what_every_layer_of_an_engine_runs_in() -> None:
    rows: list[dict[str, object]] = [
        {"node": "conv1", "asked": "int8", "ran": "int8", "unit": "gpu", "kernel": "k_one", "fused": ["relu1"]},
        {"node": "conv2", "asked": "int8", "ran": "fp32", "unit": "gpu", "kernel": "k_two", "fused": []},
        {"node": "conv3", "asked": "int8", "ran": None, "unit": "dla", "kernel": None, "fused": []},
    ]

    def told(rows: list[dict[str, object]]) -> str:
        step = StageResult(stage="deploy:orin", status="done", target="orin", details={"engine": {"layers": rows}})
        return " ".join(" ".join(outline(page([("r", Manifest(stages=(step,)))])).text).split())

    words = told(rows)
    assert "Of 3 convolutions and matrix products" in words
    for text in ("1 in int8 (gpu)", "1 in fp32 (gpu)", "1 in not told (dla)", "k_two", "relu1"):
        assert text in words, text
    assert "Not as asked, or not told: conv2, conv3." in words
    assert "All as asked." in told(rows[:1])


odd = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3))


@given(
    st.dictionaries(
        st.sampled_from(["widths_before", "widths_after", "curves", "layers", "epochs", "notes", "dropped_blocks"]),
        odd
        | st.dictionaries(st.text(max_size=4), odd, max_size=3)
        | st.lists(st.dictionaries(st.sampled_from(["ms", "node", "ran", "fused"]), odd)),
    )
)
@settings(max_examples=80, deadline=None)
def test_details_of_any_shape_are_refused_by_name_or_shown(details: dict[str, object]) -> None:
    metrics = {"top1": accuracy(5, 9, runtime="torch")}
    for facts in (
        {"stage": "prune", "details": details},
        {"stage": "deploy:orin", "target": "orin", "details": {"engine": details}},
    ):
        try:
            stage = StageResult.model_validate({"status": "done", "metrics": metrics, **facts})
        except ValidationError:
            continue
        outline(page([("r", Manifest(stages=(stage,)))]))


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_inside(low: float, span: float) -> None:
    high = low + span
    if high - low < abs(low) * 1e-6:
        return
    found = ticks(low, high)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-6 * span <= t <= high + 1e-6 * span for t in found)


def test_a_front_joins_only_what_may_be_compared() -> None:
    axes = Axis("ms", str), Axis("top-1, %", str)
    near, far = Point(1.0, 90.0, "near", "near", family="board"), Point(2.0, 92.0, "far", "far", family="laptop")
    assert '"front"' not in scatter("c", "t", "d", [near, far], *axes)
    together = [replace(near, family="laptop"), far]
    assert scatter("c", "t", "d", together, *axes).count('class="front"') == 1
    four = [*together, near, Point(3.0, 95.0, "x", "x", family="board")]
    assert scatter("c", "t", "d", four, *axes).count('class="front"') == 2


def test_the_widths_after_several_steps_are_those_of_the_last() -> None:
    steps = [
        StageResult(stage=name, status="done", details={"widths_before": {"a": 16}, "widths_after": {"a": left}})
        for name, left in (("prune-1", 8), ("prune", 4))
    ]
    words = " ".join(outline(page([("r", Manifest(stages=tuple(steps)))])).text)
    assert "from 16 to 4 channels" in words


def test_a_run_of_one_stage_makes_a_page() -> None:
    stage = StageResult(stage="dense", status="done", metrics={"macs": counted(5, "macs")})
    words = " ".join(outline(page([("r", Manifest(stages=(stage,)))])).text)
    assert "dense" in words


def test_a_front_is_of_accuracies_of_as_many_samples() -> None:
    def run(right: int, n: int, size: int) -> Manifest:
        metrics = {"top1": accuracy(right, n, runtime="torch"), "size_bytes": counted(size, "bytes")}
        return Manifest(stages=(StageResult(stage="dense", status="done", metrics=metrics),))

    small = run(180, 200, 900)
    for n, drawn in ((200, True), (20, False)):
        text = page([("a", small), ("b", run(n * 19 // 20, n, 1000))])
        assert ('<path class="front"' in text) == drawn


def test_model_card_has_figures_and_provenance(run: Path) -> None:
    card = model_card("resnet32", load_manifest(run))
    assert card.startswith("---\npipeline_tag: image-classification\n")
    for words in (
        "88.00 ± 1.03 %", "1000 samples", "measured on cpu", "predicted for Jetson Orin Nano", "quantized to INT8",
        "was skipped: tensorrt_rtx is not installed", "measure on the device before relying on them",
    ):  # fmt: skip
        assert words in card


def test_markdown_shows_tags_from_files_as_text() -> None:
    """A name, a reason or a setting may hold anything; only code spans, which show tags as they are, keep them unescaped."""
    evil = "<script>alert(1)</script>|`&"
    metrics = {"top1": accuracy(9, 10, runtime=evil), "p50_ms": latency(1.0, device=evil, runtime=evil)}
    stages = (
        StageResult(stage="dense", status="done", metrics=metrics, details={"arch": evil, "engine_status": evil}),
        StageResult(
            stage=f"target:{evil}", status="done", metrics=metrics, details={"kept": "ptq", "notes": [evil + "\n\nand more"]}
        ),
        StageResult(stage="prune", status="failed", reason=evil + "\n\n# new"),
    )
    config = {"data": evil, evil: evil, "a`": "<b>"}
    manifest = Manifest(stages=stages, config=config, created=evil, rescompress_version=evil, unfinished=(evil,))
    report = GateReport("pass", (), (), (evil,), evil, evil)
    texts = [
        model_card(evil, manifest),
        to_markdown(rows_of(manifest)),
        to_markdown([run_row(manifest, evil), run_row(manifest, "b")]),
        render.to_markdown(report),
    ]
    for text in texts:
        outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", text.replace(r"\`", "")) if "## Figures" in text else text
        assert "&lt;script&gt;" in outside
        assert "&amp;" in outside
        assert "<" not in outside
        assert "# new" not in text.splitlines()


def test_model_card_names_no_path_of_the_machine(run: Path) -> None:
    manifest = load_manifest(run).model_copy(
        update={"config": {"checkpoint": "/home/somebody/net.pt", "data": "/data/cifar10"}}
    )
    card = model_card("resnet32", manifest)
    assert "/home" not in card
    assert "`net.pt`" in card
    assert "samples of `cifar10`" in card


@pytest.mark.parametrize(("removed", "size", "steps", "step"), [(8, 16, 16, 8), (8, 16, 17, 8), (8, 16, 8, 4), (0, 16, 17, 0)])
def test_what_was_removed_is_marked_where_it_lies_on_the_curve(removed: int, size: int, steps: int, step: int) -> None:
    assert _step(removed, float(size), steps) == step


@pytest.fixture
def cli(rescompress: Command) -> Command:
    return lambda *args: rescompress("report", *args, code=None)


def test_cli_writes_page_and_card(cli: Command, run: Path, tmp_path: Path) -> None:
    done = cli(run, "-o", tmp_path / "r.html", "--model-card", tmp_path / "README.md", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"] == ["resnet32"]
    outline((tmp_path / "r.html").read_text())
    assert (tmp_path / "README.md").read_text().startswith("---")
    assert cli(tmp_path / "absent", "-o", tmp_path / "x.html").returncode == 5
    assert cli(tmp_path, "--history", "-o", tmp_path / "x.html").returncode == 5
    assert not (tmp_path / "x.html").exists()


# In a browser -----------------------------------------------------------------------------------------------------------

PROGRAM = chromium.find()
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Chromium]:
    assert PROGRAM is not None
    with chromium.Chromium(PROGRAM) as started:
        yield started


@pytest.fixture(scope="module")
def saved(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def _keep(browser: chromium.Chromium, name: str) -> None:
    """Write a screenshot where RESCOMPRESS_SCREENSHOTS says, for people to look at."""
    folder = os.environ.get("RESCOMPRESS_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.picture(Path(folder) / f"{name}.png")


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 900, False), (360, 780, True)])
def test_browser_shows_it_without_complaint_or_request(
    browser: chromium.Chromium, saved: Path, *, width: int, height: int, phone: bool, dark: bool
) -> None:
    browser.screen(width, height, phone=phone, dark=dark)
    browser.open(saved)
    assert browser.complaints == []
    assert [u for u in browser.requests if not u.startswith("data:")] == [saved.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"
    assert browser.run("document.querySelectorAll('svg.chart').length") > 15
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 19, 24)" if dark else "rgb(255, 255, 255)")
    small = browser.run(
        "[...document.querySelectorAll('svg text')].filter(t => t.textContent && t.getBoundingClientRect().height < 9).length"
    )
    assert small == 0, "letters of charts stay readable"
    _keep(browser, f"{'phone' if phone else 'desk'}-{'dark' if dark else 'light'}")


@needs_browser
def test_browser_draws_marks_and_labels_inside_their_charts(browser: chromium.Chromium, saved: Path) -> None:
    browser.screen(1280, 900)
    browser.open(saved)
    outside = browser.run(
        """[...document.querySelectorAll('svg.chart')].flatMap(svg => {
          const box = svg.getBoundingClientRect();
          return [...svg.querySelectorAll('text, circle, rect, path')].filter(e => {
            const b = e.getBoundingClientRect();
            return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1;
          }).map(e => svg.querySelector('title').textContent + ': ' + e.outerHTML);
        })"""
    )
    assert outside == []


@needs_browser
def test_keyboard_reaches_and_sorts_the_table(browser: chromium.Chromium, saved: Path) -> None:
    browser.screen(1280, 900)
    browser.open(saved)
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.className") == "skip"
    for _ in range(60):
        browser.press("Tab", 9)
        if browser.run("document.activeElement.textContent") == "ONNX size":
            break
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter", 13)
    assert browser.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"
    script = "[...document.querySelectorAll('#trade-off ~ .scroll tbody tr')].map(r => r.cells[4].dataset.value ?? '')"
    values = browser.run(script)
    filled = [float(v) for v in values if v]
    assert filled == sorted(filled)
    assert values[: len(filled)] == [v for v in values if v], "rows without the figure come last"
    browser.press("Enter", 13)
    assert [float(v) for v in browser.run(script) if v] == sorted(filled, reverse=True)


@needs_browser
def test_theme_button_overrides_the_system(browser: chromium.Chromium, saved: Path) -> None:
    browser.screen(1280, 900, dark=True)
    browser.open(saved)
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = []
    for _ in range(3):
        browser.run("document.getElementById('theme').click()")
        seen.append((browser.run("document.getElementById('theme').textContent"), browser.run(colour)))
    dark, light = "rgb(15, 19, 24)", "rgb(255, 255, 255)"
    assert seen == [("Theme: light", light), ("Theme: dark", dark), ("Theme: system", dark)]


def test_a_history_of_twice_the_runs_is_twice_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels look for a free place among everything drawn: their number is bounded, or the work is quadratic."""
    base, work = write_run(tmp_path / "run"), []
    real = charts._overlap
    monkeypatch.setattr(charts, "_overlap", lambda a, b: work.append(None) or real(a, b))

    def run(i: int) -> Manifest:
        stages = []
        for s in base.stages:
            values = {k: m.value * (1 + 0.001 * ((i * 37) % 101)) for k, m in s.metrics.items()}
            metrics = {k: m.model_copy(update={"value": values[k]}) for k, m in s.metrics.items()}
            stages.append(s.model_copy(update={"metrics": metrics}))
        created = f"2026-01-01T{i // 60:02d}:{i % 60:02d}:00Z"
        return base.model_copy(update={"stages": tuple(stages), "created": created})

    counts = []
    for n in (40, 80):
        work.clear()
        page([(f"run-{i:03d}", run(i)) for i in range(n)], history=True)
        counts.append(len(work))
    assert 0 < counts[1] < 2.5 * counts[0]


@needs_browser
def test_a_long_history_stays_small_and_opens_quickly(browser: chromium.Chromium, tmp_path: Path) -> None:
    runs = []
    base = write_run(tmp_path / "run")
    for i in range(200):
        stages = tuple(
            s.model_copy(
                update={
                    "metrics": {
                        k: m.model_copy(update={"value": m.value * (1 + 0.001 * ((i * 37) % 11))}) for k, m in s.metrics.items()
                    }
                }
            )
            for s in base.stages
        )
        runs.append(
            (
                f"run-{i:03d}",
                base.model_copy(update={"stages": stages, "created": f"2026-01-01T{i // 60:02d}:{i % 60:02d}:00Z"}),
            )
        )
    path = tmp_path / "history.html"
    path.write_text(page(runs, history=True), encoding="utf-8")
    outline(path.read_text())
    assert path.stat().st_size < 5_000_000
    browser.screen(1280, 900)
    browser.open(path)
    assert browser.complaints == []
    took = browser.run("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < took < 2000
    assert browser.run("document.querySelectorAll('#runs ~ .scroll tbody tr').length") == 200
    _keep(browser, "history")
