"""Every command's --json, and the files, beside their schemas; what stands in a document is also described."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter
from report_factory import write_run

from rescompress.cli.app import COMMANDS
from rescompress.show.documents import FILES, OUTPUTS, SCHEMAS, schema_of

Command = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "resnet20_digits.safetensors"


def undescribed(value: object, at: str) -> Iterator[str]:
    """Yield the keys that no model names."""
    if isinstance(value, BaseModel):
        yield from (f"{at}.{key}" for key in value.model_extra or ())
        for name in type(value).model_fields:
            yield from undescribed(getattr(value, name), f"{at}.{name}")
    elif isinstance(value, list | tuple):
        for one in value:
            yield from undescribed(one, f"{at}[]")
    elif isinstance(value, dict):
        for one in value.values():
            yield from undescribed(one, f"{at}{{}}")


def holds(name: str, text: str, *, more: bool = False) -> Any:
    """Check a document against its schema, by a validator of JSON Schema where there is one, and return it."""
    document = json.loads(text)
    read = TypeAdapter(OUTPUTS[name]).validate_python(document)
    assert more or list(undescribed(read, name)) == []
    try:
        import jsonschema
    except ModuleNotFoundError:
        return document
    jsonschema.Draft202012Validator(schema_of(name)).validate(document)
    return document


def test_every_command_has_a_schema() -> None:
    assert OUTPUTS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one(name: str) -> None:
    schema = schema_of(name)
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)


def test_schema_prints_and_writes_them(rescompress: Command, tmp_path: Path) -> None:
    listed = holds("schema", rescompress("schema", "--json", cwd=tmp_path).stdout)
    assert [row["name"] for row in listed] == list(SCHEMAS)
    assert json.loads(rescompress("schema", "evaluate", cwd=tmp_path).stdout) == schema_of("evaluate")
    rescompress("schema", "gate", "-o", "schemas", cwd=tmp_path)
    assert json.loads((tmp_path / "schemas" / "gate.json").read_text()) == schema_of("gate")
    assert "did you mean" in rescompress("schema", "evalaute", cwd=tmp_path, code=5).stderr


@pytest.mark.parametrize("name", ["formats", "targets", "methods", "doctor"])
def test_what_is_known(rescompress: Command, tmp_path: Path, name: str) -> None:
    holds(name, rescompress(name, "--json", cwd=tmp_path).stdout)


def test_looking_and_deciding(rescompress: Command, tmp_path: Path) -> None:
    holds("inspect", rescompress("inspect", DIGITS, "--json", cwd=tmp_path).stdout)
    holds("predict", rescompress("predict", DIGITS, "--json", cwd=tmp_path).stdout)
    holds("init", rescompress("init", DIGITS, "--json", cwd=tmp_path).stdout)
    for name in ("one", "other"):
        write_run(tmp_path / "runs" / name)
    holds("compare", rescompress("compare", "runs/one", "runs/other", "--json", cwd=tmp_path).stdout)
    holds("compare", rescompress("compare", "runs", "--history", "--json", cwd=tmp_path).stdout)
    holds("report", rescompress("report", "runs/one", "--model-card", "card.md", "--json", cwd=tmp_path).stdout)
    gate = ("gate", "runs/one", "--baseline", "runs/other", "--on-inconclusive", "pass", "--json")
    assert holds("gate", rescompress(*gate, cwd=tmp_path, code=None).stdout)["verdict"]
    holds("gate", rescompress("gate", "runs/one", "--save-baseline", "base.json", "--json", cwd=tmp_path).stdout)


@pytest.mark.slow
def test_pruning_exporting_measuring(rescompress: Command, tmp_path: Path) -> None:
    data = ("--data", "builtin:digits")
    holds("prune", rescompress("prune", DIGITS, "--ratio", "0.3", "--json", cwd=tmp_path).stdout)
    holds("sensitivity", rescompress("sensitivity", DIGITS, "--json", cwd=tmp_path).stdout)
    exported = holds("export", rescompress("export", DIGITS, "--target", "jetson", "--json", cwd=tmp_path).stdout)
    lint = rescompress("lint", exported["onnx"], "--target", "jetson", "--json", cwd=tmp_path, code=None)
    holds("lint", lint.stdout)
    holds("deploy", rescompress("deploy", exported["onnx"], "--dry-run", "--json", cwd=tmp_path).stdout)
    holds("evaluate", rescompress("evaluate", exported["onnx"], *data, "--json", cwd=tmp_path).stdout)


@pytest.mark.slow
def test_training_running_searching(rescompress: Command, tmp_path: Path) -> None:
    data = ("--data", "builtin:digits")
    short = ("--epochs", "0.05", "--train-batch", "32")
    holds("finetune", rescompress("finetune", DIGITS, *data, *short, "--json", cwd=tmp_path).stdout)
    holds("quantize", rescompress("quantize", DIGITS, *data, "--calib", "32", "--json", cwd=tmp_path).stdout)
    pruned = ("prune", DIGITS, *data, "--macs", "0.6", "--calib", "32", "--finetune-epochs", "0.05", "--json")
    holds("prune", rescompress(*pruned, cwd=tmp_path).stdout)
    holds("sensitivity", rescompress("sensitivity", DIGITS, *data, "--int8", "--calib", "32", "--json", cwd=tmp_path).stdout)
    exported = holds("export", rescompress("export", "--target", "cpu", *data, "--json", cwd=tmp_path).stdout)
    timed = ("bench", exported["onnx"], "--target", "cpu", "--seconds", "0.2", "--rounds", "1", "--json")
    holds("bench", rescompress(*timed, cwd=tmp_path).stdout)
    holds("bench", rescompress("bench", exported["onnx"], *timed[1:], cwd=tmp_path).stdout)
    config = tmp_path / "run.yaml"
    config.write_text(f"checkpoint: {DIGITS}\ndata: builtin:digits\nprune: {{macs: 0.6, calib: 32}}\ntargets: [jetson]\n")
    done = holds("run", rescompress("run", config, "--json", cwd=tmp_path).stdout)
    for name, file in {"manifest-file": done["manifest"], "plan-file": f"{done['folder']}/plan.json"}.items():
        module, attribute = FILES[name]
        text = (tmp_path / file).read_text()
        getattr(importlib.import_module(module), attribute).model_validate_json(text)
        try:
            import jsonschema
        except ModuleNotFoundError:
            continue
        jsonschema.Draft202012Validator(schema_of(name)).validate(json.loads(text))
    pytest.importorskip("optuna")
    holds("search", rescompress("search", config, "--trials", "1", "-o", "found", "--json", cwd=tmp_path).stdout)
    for verb in ("status", "front", "stop"):
        holds("search", rescompress("search", verb, "found", "--json", cwd=tmp_path).stdout)
    holds("search", rescompress("search", "best", "found", "--max-drop", "100", "--json", cwd=tmp_path).stdout)
