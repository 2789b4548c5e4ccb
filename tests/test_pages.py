"""Links of all pages lead somewhere, headings included; figures are stated; the site builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
_LINK = re.compile(r"\[[^\]\n]*\]\(\s*([^)\s]+)(?:\s+\"[^\"]*\")?\s*\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)


def text_of(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text_of(page), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        found.add(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(re.sub(r"`[^`\n]*`", "", text_of(page))):
        if re.match(r"(https?|mailto):", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} of {page.name} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} of {page.name} leads out of the repository"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link} of {page.name}: no such heading"


def test_pages_speak_of_files_that_are_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md")]:
        for named in re.findall(
            r"\b((?:benchmarks|tests|docs|examples)/[\w/.-]+\.(?:py|md|yaml|yml|ipynb|json))\b", page.read_text()
        ):
            assert (ROOT / named).exists(), f"{page.name}: {named}"


def test_every_figure_that_can_be_made_again_is_stated(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/figures.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 20
    for script in set(re.findall(r"benchmarks/\w+\.py", (ROOT / "benchmarks" / "figures.py").read_text())):
        assert (ROOT / script).is_file()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in ("index.html", "api.html", "tutorials/orin.html", "schemas/manifest-file.json"):
        assert (tmp_path / page).is_file()


def test_an_issue_comes_with_what_is_installed() -> None:
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(templates) >= 3
    for path in templates:
        if path.name != "config.yml":
            assert "rescompress doctor --json" in path.read_text(encoding="utf-8")
    for name in ("SECURITY.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/releasing.md"):
        assert (ROOT / name).is_file()


def test_the_page_for_programs_knows_every_exit_code() -> None:
    from rescompress.core import errors

    table = dict(re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "AGENTS.md").read_text(encoding="utf-8"), re.M))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RescompressError)]
    assert table.keys() >= {"0", "2", "130", *(str(kind.exit_code) for kind in kinds)}
