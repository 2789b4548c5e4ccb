"""The one YAML reader: an oracle for plain documents, and what must not pass for something else."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT
from hypothesis import given
from hypothesis import strategies as st

from rescompress.core.errors import BadInput, ConfigError, shown
from rescompress.core.labels import parse_labels
from rescompress.core.strict_yaml import StrictYamlError, load, parse
from rescompress.runs.config import load_config
from rescompress.show.gate import load_limits

NUMBERS = st.integers(-(10**12), 10**12) | st.integers(-(10**9), 10**9).map(lambda n: n / 1024)  # written without exponents
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8
)
FILES = sorted([*ROOT.glob("edge_targets/devices/*.yaml"), *ROOT.glob("examples/**/*.yaml")])


def bomb(levels: int = 9, width: int = 9) -> str:
    text = "[&a0 [" + ",".join(["lol"] * width) + "]"
    for i in range(1, levels):
        text += f",&a{i} [" + ",".join([f"*a{i - 1}"] * width) + "]"
    return text + "]"


@given(VALUES)
def test_what_json_and_yaml_writers_write_is_read_back(value: Any) -> None:
    """The oracle is the value itself, through two writers that quote whatever is ambiguous."""
    assert parse(yaml.safe_dump(value)) == value
    assert parse(json.dumps(value)) == value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_of_the_project_mean_what_they_meant(path: Path) -> None:
    assert parse(path.read_text()) == yaml.safe_load(path.read_text())


@given(st.from_regex(r"[-+]?[0-9][0-9_:.eExob]{0,6}", fullmatch=True))
def test_a_number_is_never_another_number(text: str) -> None:
    """As a person reads it, in plain decimal digits (or 0x), or refused, or text that is left to the setting."""
    try:
        found = parse(f"a: {text}")["a"]
    except StrictYamlError:
        return
    if isinstance(found, str):
        assert found == text
    elif text.lower().startswith("0x"):
        assert found == int(text, 16)
    else:
        assert not text.lstrip("+-").startswith("0") or "." in text or int(text) == 0
        assert found == float(text.replace("_", ""))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 010", "write 10, or '010'"),
        ("a: -010", "write -10"),
        ("x: 1\na: 1:30", "line 2: 1:30"),
        ("a: 12:30:45.5", "is one number"),
        ("a: 0b11", "is one number"),
        ("a: 1_0", "is one number"),
        ("a: 1.0e+999", "beyond every number"),
        ("a: 0.5\nb: 1\na: 50", "line 3: 'a' stands in line 1"),
        ("s: {a: 1, 'a': 2}", "'a' stands in line 1"),
        ("a: !!set {x}", "tag"),
        ("a: !!python/name:os.system ''", "tag"),
        ("? !!python/name:os.system ''\n: 1", "tag"),
        ("a: !own 5", "tag"),
        ("a: &x [*x]", "contains itself"),
        ("a: &x {b: *x}", "contains itself"),
        ("&a {checkpoint: *a}", "contains itself"),
        (f"a: {bomb()}", "aliases stand for"),
        (
            "y0: &b0 {a: 1}\n" + "".join(f"y{i}: &b{i} {{<<: [*b{i - 1}, *b{i - 1}]}}\n" for i in range(1, 30)),
            "aliases stand for",
        ),
        ("a: " + "[" * 1000 + "]" * 1000, "nested"),
        ("- " * 3000, "nested"),
        ("a: " + "9" * 5000, "5000 characters"),
        ("? [a, b]\n: 1", "a key is"),
        ("a: b: c", "mapping values"),
        ("a: 1\n---\na: 2", "single document"),
        ("a: \x00", "character"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_what_is_ambiguous_or_hostile_is_refused(text: str, words: str) -> None:
    begin = time.monotonic()
    with pytest.raises(StrictYamlError, match=words.replace("[", r"\[")):
        parse(text)
    assert time.monotonic() - begin < 30  # seconds at the most on the slowest machine; a bomb takes forever


def test_words_and_keys_are_what_is_written() -> None:
    assert parse("yes: no\nnull: on\n08: 2021-01-01\n010: =\n") == {"yes": "no", "null": "on", "08": "2021-01-01", "010": "="}
    assert parse("a: {<<: {x: 1, y: 2}, x: 3}") == {"a": {"x": 3, "y": 2}}
    assert parse("b: &b {x: 1}\na: {<<: *b, y: 1_000}") == {"b": {"x": 1}, "a": {"x": 1, "y": 1000}}
    assert parse("010: 007", texts=None) == {"010": "007"}
    assert parse("labels: {no: 010}\nseed: 0x10\n", texts=("labels",)) == {"labels": {"no": "010"}, "seed": 16}
    assert parse("labels: null", texts=("labels",)) == {"labels": None}
    assert parse("") is None


PAIRS = [
    ("yes", "no"),
    ("08", "09"),
    ("010", "007"),
    ("1_0", "2_0"),
    ("on", "off"),
    ("null", "~"),
    ("2021-01-01", "1e3"),
    ("12:30", "1:1"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=str)
def test_class_folders_have_the_names_they_have(tmp_path: Path, one: str, other: str) -> None:
    (tmp_path / "labels.yaml").write_text(f"{one}: 0\n{other}: 1\n")
    assert parse_labels(str(tmp_path / "labels.yaml")) == {one: "0", other: "1"}
    (tmp_path / "labels.json").write_text(json.dumps({one: 0, other: 1}))
    assert parse_labels(str(tmp_path / "labels.json")) == {one: "0", other: "1"}
    config = tmp_path / "c.yaml"
    config.write_text(f"checkpoint: c.pt\ndata: builtin:digits\nlabels:\n  {one}: 0\n  {other}: {other}\n")
    assert load_config(config).labels == {one: "0", other: other}
    config.write_text("checkpoint: c.pt\ndata: builtin:digits\n")
    assert load_config(config, (f"labels.{one}={other}",)).labels == {one: other}
    assert load_config(config, (f"labels={{{one}: 0}}",)).labels == {one: "0"}
    assert load_config(config, ("labels=null",)).labels is None


HOSTILE = [
    f"{{key}}: {bomb()}\n",
    "{key}: 010\n",
    "{key}: 1:30\n",
    "{key}: 1\n{key}: 2\n",
    "{key}: !!python/name:os.system ''\n",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
def test_every_reader_refuses_what_the_one_reader_refuses(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("checkpoint: c.pt\ndata: builtin:digits\n" + text.replace("{key}", "seed"))
    with pytest.raises(ConfigError, match=r"line [1-4]: "):
        load_config(path)
    path.write_text(text.replace("{key}", "max_drop"))
    with pytest.raises(ConfigError, match=r"line [1-4]: "):
        load_limits(path)
    if "010" not in text and "1:30" not in text:  # there they are names
        with pytest.raises(BadInput):
            parse_labels(str(path))
    if text.count("{key}") == 1:
        path.write_text("checkpoint: c.pt\ndata: builtin:digits\n")
        with pytest.raises(ConfigError, match="no YAML value") as caught:
            load_config(path, (text.replace("{key}: ", "seed=").strip(),))
        assert len(str(caught.value)) < 500


def test_no_value_makes_a_long_error(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for key in ("checkpoint", "seed", "labels", "arch_options", "prune", "targets", "foo"):
        lines = {"checkpoint": "c.pt", "data": "d"} | {key: bomb(4)}
        path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert len(str(caught.value)) < 1000, key
    assert len(shown(["x" * 10**6] * 100)) < 1000
    assert shown(10**5000)


@pytest.mark.parametrize("read", [load_config, load_limits, lambda path: load(path, missing="", remedy="")])
def test_what_is_no_file_is_refused_before_it_is_read(tmp_path: Path, read: Any) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "absent", Path("a\0b")):
        with pytest.raises(ConfigError):
            read(path)


def test_a_name_with_a_nul_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for line in ('checkpoint: "a\\0b"\ndata: d\n', 'checkpoint: c.pt\ndata: "a\\0b"\n'):
        path.write_text(line)
        with pytest.raises(ConfigError, match="NUL"):
            load_config(path)


def test_infinity_is_a_number_where_it_may_be_one() -> None:
    assert parse("a: .inf")["a"] == math.inf
    assert parse("a: -.Inf")["a"] == -math.inf
    assert math.isnan(parse("a: .nan")["a"])
