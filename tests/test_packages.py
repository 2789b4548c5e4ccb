"""What is published: the wheel and the source distribution, their names, their version, and the licences they need."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from importlib.metadata import distributions
from pathlib import Path

import pytest
from archives import extract

ROOT = Path(__file__).parents[1]
OURS = {"rescompress", "compress", "export", "edge_targets"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LIMIT_MB = 9


def test_nothing_else_that_is_installed_ships_our_names() -> None:
    """The names of the siblings are common: whoever else installs one of them is found here, and by `doctor`."""
    for distribution in distributions():
        if distribution.metadata["Name"].lower() == "rescompress":
            continue
        tops = {Path(f).parts[0].removesuffix(".py") for f in distribution.files or () if f.suffix == ".py"}
        assert not tops & OURS, distribution.metadata["Name"]


def test_the_version_has_one_source_and_a_section() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## Unreleased$", changes, re.M)
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    if (ROOT / ".git").exists() and shutil.which("git"):
        said = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        for tag in re.findall(r"^v(\d.*)$", said.stdout, re.M):
            assert tag == PROJECT["version"], "the tag names another version than pyproject.toml"
            assert re.search(rf"^## {re.escape(tag)}\b", changes, re.M), "the changelog lacks the version of the tag"


def test_the_licences_of_every_dependency_are_listed() -> None:
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8").lower()
    stated = [r for r in PROJECT["dependencies"]]
    stated += [r for extra, some in PROJECT["optional-dependencies"].items() if extra not in ("dev", "docs") for r in some]
    for requirement in stated:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()
        assert re.search(rf"^\| {re.escape(name)} \| \S", page, re.M), f"{name}: run `python docs/licences.py`"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the source distribution of a copy of this tree, and the wheel that is built of that."""
    place = tmp_path_factory.mktemp("built")
    ignore = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "rescompress-out")
    shutil.copytree(ROOT, place / "tree", ignore=ignore, symlinks=True)
    build = "import sys; from setuptools.build_meta import build_{0}; print(build_{0}(sys.argv[1]))"

    def make(what: str, tree: Path) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", build.format(what), str(place)], cwd=tree, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return place / done.stdout.splitlines()[-1]

    source = make("sdist", place / "tree")
    extract(source, place / "unpacked")
    (unpacked,) = (place / "unpacked").iterdir()
    return source, make("wheel", unpacked)


@pytest.mark.slow
def test_the_source_distribution_holds_every_file_of_the_repository(built: tuple[Path, Path]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    with tarfile.open(built[0]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert set(listed) - inside == set()
    assert not {name for name in inside if "__pycache__" in name or name.startswith(("rescompress-out", ".venv"))}


@pytest.mark.slow
def test_the_wheel_is_small_and_complete(built: tuple[Path, Path]) -> None:
    wheel = built[1]
    assert wheel.stat().st_size < LIMIT_MB * 1e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = HeaderParser().parsestr(archive.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == OURS
    code = {p.relative_to(ROOT).as_posix() for top in OURS for p in (ROOT / top).rglob("*.py")}
    assert code <= set(names)
    assert {f"{top}/py.typed" for top in OURS} <= set(names)
    assert any(re.fullmatch(r"rescompress/demo/\w+\.yaml", name) for name in names)
    assert any(re.fullmatch(r"rescompress/demo/\w+\.safetensors", name) for name in names)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == PROJECT["version"]
    assert any(name.endswith("/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_alone_runs_the_demo_reports_and_gates(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Without the repository: the wheel's files are all that Python finds of ours."""
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(tmp_path / "site")
    work = tmp_path / "work"
    work.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path / "site")}

    def call(*args: str, code: int = 0) -> str:
        command = [sys.executable, "-P", "-m", "rescompress", *args]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=580, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout

    assert "rescompress" in call("--help")
    assert json.loads(call("doctor", "--json"))["problem"] is None
    short = ("--set", "targets=[cpu]", "--set", "finetune.epochs=0.1", "--set", "quantize.mode=ptq", "--set", "prune.calib=32")
    document = json.loads(call("demo", "--json", *short))
    folder = document["folder"]
    where = json.loads((work / folder / "manifest.json").read_text(encoding="utf-8"))["config"]["checkpoint"]
    assert Path(where).is_relative_to(tmp_path / "site")
    assert (work / folder / "report.html").is_file()
    assert json.loads(call("report", folder, "-o", "page.html", "--json"))["report"] == "page.html"
    assert json.loads(call("gate", folder, "--baseline", folder, "--json", "--on-inconclusive", "pass"))["verdict"] != "fail"
