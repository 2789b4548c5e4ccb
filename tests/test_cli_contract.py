"""The command line: help is light, names and JSON keys are those of the contract, errors have their exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import tomllib
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from command_line import Command, run_command
from pydantic import BaseModel
from safetensors.torch import save_file

from compress.checkpoints import load_checkpoint
from compress.prune import method_names
from compress.resnet import build_model
from edge_targets import benchmark
from edge_targets.catalog import target_names
from rescompress.cli import doctor, options
from rescompress.cli.app import COMMANDS, main
from rescompress.cli.output import Output
from rescompress.core.described import flag_of
from rescompress.core.manifest import load_manifest
from rescompress.core.settings import PruneSettings
from rescompress.runs.config import RunConfig, load_config
from rescompress.runs.stage import Opening

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "yaml", "pydantic", "onnx", "onnxruntime", "openvino", "nncf", "sklearn", "PIL", "scipy")
DIGITS = ROOT / "examples" / "resnet20_digits.safetensors"


def call(*args: str, cwd: Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own and expect an exit code."""
    return run_command(*args, cwd=cwd, code=code)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, contextlib, io\n"
        "from rescompress.cli.app import main\n"
        "sys.argv = ['rescompress', '--help']\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit): main()\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])\n"
        "print(out.getvalue().count('prune'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, mentions = done.stdout.splitlines()
    assert loaded == "[]"
    assert int(mentions) >= 1


@pytest.fixture(scope="session")
def helps() -> dict[str, str]:
    """Return the help text of every command, rendered with heavy packages blocked (Typer itself may use pydantic)."""
    script = (
        "import sys, contextlib, io, json\n"
        f"for m in set({HEAVY!r}) - {{'pydantic'}}: sys.modules[m] = None\n"
        "from rescompress.cli.app import COMMANDS, _build\n"
        "from rescompress.cli.output import Output\n"
        "texts = {}\n"
        "for name in COMMANDS:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit): _build(Output())([name, '--help'])\n"
        "    texts[name] = out.getvalue()\n"
        "json.dump(texts, sys.stdout)\n"
    )
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    texts: dict[str, str] = json.loads(done.stdout)
    return texts


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_an_example_and_the_common_options(helps: dict[str, str], name: str) -> None:
    text = helps[name]
    assert f"Example: rescompress {name}" in text or f"-m rescompress {name}" in text
    for option in ("--json", "--verbose", "--quiet", "--debug"):
        assert option in text


def test_the_choices_of_an_option_are_shown_and_kept_to(helps: dict[str, str], rescompress: Command, tmp_path: Path) -> None:
    assert "inner|all" in helps["prune"]
    assert "inner|all" in helps["sensitivity"]
    assert "fp32|tf32|bf16|fp16" in helps["finetune"]
    assert "auto|tensorrt|openvino|onnxruntime" in helps["quantize"]
    assert "auto|fp32|fp16|int8" in helps["export"]
    done = rescompress("prune", DIGITS, "--scope", "outer", cwd=tmp_path, code=2)
    assert all(word in done.stderr for word in ("--scope", "outer", "inner", "all"))


def test_the_shell_completes_methods_and_targets() -> None:
    method = flag_of(PruneSettings, "method").completes
    assert method is not None
    assert method("") == method_names()
    assert method("rec") == ["reconstruct"]
    assert options.targets("jetson-orin-nano") == [n for n in target_names() if n.startswith("jetson-orin-nano")] != []


def test_the_shell_completes_every_option_whose_values_are_names() -> None:
    """Asked as a shell asks, of the commands as they are."""
    from typer.main import get_command

    from rescompress.cli.app import _build

    group = get_command(_build(Output()))
    context = group.make_context("rescompress", [], resilient_parsing=True, obj=Output())
    asked = {"--like": "resnet56", "--preprocess": "keras-c", "--device": "c", "--split": "v", "--target": "cpu"}
    seen = set()
    for name in COMMANDS:
        _, command, _ = group.resolve_command(context, [name])  # type: ignore[attr-defined]
        for parameter in command.params:
            for option in set(parameter.opts) & set(asked):
                found = [item.value for item in parameter.shell_complete(context, asked[option])]
                assert found, f"{name} {option}"
                assert all(value.startswith(asked[option]) for value in found), f"{name} {option}"
                seen.add(option)
    assert seen == set(asked)


def test_the_tables_of_commands_name_every_command() -> None:
    table = (ROOT / "README.md").read_text().partition("## Commands")[2].partition("\n\nEvery command")[0]
    assert sorted(re.findall(r"`([a-z]+)`", table)) == sorted(COMMANDS), "the table of README.md"
    documents = (ROOT / "docs" / "run.md").read_text().partition("## The JSON documents")[2]
    assert sorted(re.findall(r"^\| `([a-z]+)` \|", documents, re.M)) == sorted(COMMANDS), "the table of docs/run.md"


def test_every_key_of_a_config_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "run.md").read_text().partition("## The folder")[0]
    parts = re.split(r"^### (\w+)$", text, flags=re.M)
    sections = {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    models: dict[str, type[BaseModel]] = {"": RunConfig}
    for name, field in RunConfig.model_fields.items():
        below = [part for part in typing.get_args(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        models.update((name, part) for part in below)
    assert sections.keys() == models.keys()
    for name, model in models.items():
        rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \| .+ \|$", sections[name], re.M)
        assert [key for key, _ in rows] == list(model.model_fields), name
        for key, default in rows:
            field = model.model_fields[key]
            if field.is_required():
                assert default == "required"
            else:
                usual = json.loads(json.dumps(field.get_default(call_default_factory=True)))
                assert yaml.safe_load(default) == usual, f"{name}.{key}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"} == set(re.findall(r"\]\(([\w-]+\.md)\)", index))


def test_prune_then_export_as_typed(rescompress: Command, tmp_path: Path) -> None:
    from compress.resnet import build_model
    from compress.zoo import spec

    torch.manual_seed(0)
    save = {k: v for k, v in build_model(spec("resnet18", num_classes=10)).state_dict().items()}
    torch.save(save, tmp_path / "resnet18.pt")
    pruned = json.loads(
        rescompress("prune", "--ratio", "0.3", "resnet18.pt", "--input", "3x32x32", "--json", cwd=tmp_path).stdout
    )
    assert pruned["method"] == "magnitude"
    assert pruned["macs_after"] < pruned["macs_before"]
    assert pruned["params_after"] < pruned["params_before"]
    assert pruned["widths"]["layer1.0.conv1"] == 48  # 64 x 0.7 = 44.8: the nearest multiple of 8 is 48
    assert (tmp_path / pruned["output"]).is_file()
    assert {"dropped_blocks", "seconds"} <= pruned.keys()
    exported = json.loads(rescompress("export", "--target", "jetson", "--json", cwd=tmp_path).stdout)
    assert (tmp_path / exported["onnx"]).is_file()
    assert exported["engine"] is None
    assert "board" in exported["engine_status"]
    assert exported["macs"] == pruned["macs_after"]
    assert exported["size_bytes"] == (tmp_path / exported["onnx"]).stat().st_size
    assert exported["latency"]["provenance"] == "predicted"
    assert exported["latency"]["low"] < exported["latency"]["p50_ms"] < exported["latency"]["high"]
    assert exported["parity"]["top1_agreement"] == 1.0
    assert exported["parity_in_integers"] is None
    assert isinstance(exported["lint"], list)
    assert "build.sh" in exported["files"]
    rescompress("export", "--target", "jetson", "--require-engine", cwd=tmp_path, code=4)


def test_quantize_export_evaluate_on_digits(rescompress: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief = benchmark.Effort(warmup_s=0.05, seconds=0.1, rounds=2)
    monkeypatch.setattr(benchmark, "Effort", lambda: brief)
    made = json.loads(
        rescompress(
            "quantize",
            str(DIGITS),
            "--data",
            "builtin:digits",
            "--calib",
            "64",
            "--json",
            "-o",
            "int8.safetensors",
            cwd=tmp_path,
        ).stdout
    )
    assert made["output"] == "int8.safetensors"
    assert made["top1_before"] - made["top1_after"] < 0.02
    exported = json.loads(
        rescompress(
            "export", "int8.safetensors", "-t", "cpu-ort", "-d", "builtin:digits", "--json", "-o", "out", cwd=tmp_path
        ).stdout
    )
    assert exported["onnx"] == "out/model.onnx"
    assert exported["parity"]["top1_agreement"] >= 0.999
    assert exported["parity_in_integers"]["max_abs"] == 0.0
    assert exported["latency"]["provenance"] == "measured"
    assert exported["size_bytes"] < 0.3 * DIGITS.stat().st_size
    for model, runtime in (("out/model.onnx", "onnxruntime"), ("int8.safetensors", "torch")):
        found = json.loads(rescompress("evaluate", model, "--data", "builtin:digits", "--json", cwd=tmp_path).stdout)
        assert (found["n"], found["runtime"]) == (360, runtime)
        assert found["top1"] == pytest.approx(made["top1_after"], abs=0.006)
        assert found["top5"] > 0.99


def test_bad_input_ends_with_its_code_and_a_remedy(rescompress: Command, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(DIGITS.read_bytes()[:5000])
    save_file({"a.weight": torch.zeros(3, 3)}, tmp_path / "foreign.safetensors")
    np.savez(tmp_path / "three.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=np.array([0, 1, 2, 77]))
    (tmp_path / "bad.yaml").write_text("checkpoint: x.pt\ndata: builtin:digits\nprunee: {}\n")
    digits = str(DIGITS)
    cases = [
        (("inspect", "none.pt"), 5),
        (("prune", "text.pt", "--ratio", "0.3"), 5),
        (("prune", "cut.safetensors", "--ratio", "0.3"), 5),
        (("prune", "foreign.safetensors", "--ratio", "0.3"), 5),
        (("prune", digits, "--macs", "0.0001"), 5),
        (("prune", digits, "--ratio", "1.5"), 5),
        (("prune", digits, "--ratio", "0.3", "--macs", "0.3"), 5),
        (("prune", digits, "--ratio", "0.3", "--method", "magnitud"), 5),
        (("prune", digits, "--ratio", "0.3", "--target", "jetsn"), 5),
        (("prune", digits, "--nonsense"), 2),
        (("prune",), 2),
        (("export",), 5),
        (("export", digits, "--target", "cpu", "--precision", "int8"), 5),
        (("export", digits, "--target", "cpu", "--batch", "0"), 5),
        (("evaluate", digits, "--data", "three.npz"), 5),
        (("evaluate", digits, "--data", "nowhere"), 5),
        (("run", "bad.yaml"), 5),
        (("run", "none.yaml"), 5),
    ]
    for args, code in cases:
        done = rescompress(*args, cwd=tmp_path, code=code)
        assert done.stdout == "", args
        if code != 2:
            assert done.stderr.count("error: ") == 1, (args, done.stderr)
            assert "  -> " in done.stderr, (args, done.stderr)
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".partial")]


def test_a_command_that_would_eat_its_own_input_is_refused(rescompress: Command, tmp_path: Path) -> None:
    rescompress("prune", DIGITS, "--ratio", "0.3", cwd=tmp_path)
    made = tmp_path / "rescompress-out" / "prune.safetensors"
    before = made.read_bytes()
    done = rescompress(
        "prune", "rescompress-out/prune.safetensors", "--ratio", "0.3", "-o", "x.safetensors", cwd=tmp_path, code=5
    )
    assert "would be replaced" in done.stderr
    assert made.read_bytes() == before
    made.rename(tmp_path / "mine.safetensors")
    rescompress("prune", "mine.safetensors", "--ratio", "0.3", cwd=tmp_path)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), 7),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 7),
        (torch.OutOfMemoryError("CUDA out of memory"), 7),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 7),
        (OSError(12, "Cannot allocate memory"), 7),
        (RuntimeError("can't start new thread"), 7),
        (PermissionError(13, "Permission denied", "out/.stages/.claimed.json"), 7),
        (OSError(30, "Read-only file system", "out/x"), 7),
        (OSError(24, "Too many open files", "out/x"), 7),
        (FileNotFoundError(2, "No such file or directory", "out/x"), 1),
        (PermissionError(1, "Operation not permitted"), 1),
        (ImportError("No module named 'x'"), 1),
        (RuntimeError("shapes do not match"), 1),
    ],
)
def test_what_the_system_refuses_is_no_bug(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert Output().failure(error) == code
    assert ("bug" in capsys.readouterr().err) == (code == 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of address space is one of Linux")
def test_too_little_address_space_for_torch_is_no_bug() -> None:
    import resource

    done = subprocess.run(
        [sys.executable, "-m", "rescompress", "inspect", str(DIGITS)],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20)),
    )
    assert done.returncode == 7, done.stderr
    assert "ulimit -v" in done.stderr
    assert "bug" not in done.stderr


def test_an_interrupt_while_the_command_line_is_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    class Importing:
        find_spec = staticmethod(interrupt)

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "rescompress.cli.app")
        patch.setattr(sys, "meta_path", [Importing()])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "rescompress" / "__main__.py"), run_name="__main__")
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    monkeypatch.setattr("rescompress.cli.app._build", interrupt)
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_the_best_state_may_be_within_an_epoch(rescompress: Command, tmp_path: Path) -> None:
    words = ["--data", "builtin:digits", "--epochs", "0.2", "--hold-out", "0.2", "--lr", "1e-6"]
    rescompress("finetune", DIGITS, *words, cwd=tmp_path)
    best = load_manifest(tmp_path / "rescompress-out").stages[-1].details.document()["best_epoch"]
    assert 0 < best < 1


def test_an_export_is_no_single_file(rescompress: Command, tmp_path: Path) -> None:
    done = rescompress("export", DIGITS, "-t", "cpu-ort", "-o", "out.onnx", cwd=tmp_path, code=5)
    assert "-o out)" in done.stderr
    assert "out.tar.gz" in done.stderr
    assert not list(tmp_path.iterdir()), "it is said before any work"


def test_an_interrupted_measurement_says_so_alone(rescompress: Command, tmp_path: Path) -> None:
    rescompress("export", DIGITS, "--target", "jetson-nano", "-o", "out", cwd=tmp_path)
    words = [sys.executable, "-m", "rescompress", "bench", "out/model.onnx", "-t", "cpu-ort", "--seconds", "60"]

    def heard() -> None:
        """Hear the interrupt although the tests may run in the background, where a shell has it ignored."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, process_group=0, preexec_fn=heard
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        end = time.monotonic() + 60
        while not children.read_text() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        for _ in range(6):  # Python drops an interrupt that falls into a callback of its own; people press again
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
                break
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_reader_that_has_seen_enough_is_no_failure(more: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "rescompress", "targets", "-v", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.lower()


def test_a_terminal_without_a_character_is_no_bug(tmp_path: Path) -> None:
    done = run_command("init", DIGITS, "-o", "käse.yaml", cwd=tmp_path, code=0, PYTHONIOENCODING="ascii")
    assert done.stdout.startswith("k?se.yaml is written")


def test_an_empty_world_size_is_none(rescompress: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    rescompress("prune", DIGITS, "--ratio", "0.3", "--method", "magnitude", cwd=tmp_path)


def test_a_pickle_that_holds_code_is_refused_and_named(rescompress: Command, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    done = rescompress("inspect", "evil.pt", cwd=tmp_path, code=5)
    assert "system" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_verbose_tells_what_a_command_took(rescompress: Command, tmp_path: Path) -> None:
    assert re.search(r"^took \d+\.\d s, at most \d+ MiB of memory$", rescompress("methods", "-v", cwd=tmp_path).stderr, re.M)
    assert "took" in rescompress("inspect", "absent.pt", "-v", cwd=tmp_path, code=5).stderr, (
        "a command that failed took time, too"
    )
    assert "took" not in rescompress("methods", cwd=tmp_path).stderr


def test_doctor_knows_every_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)  # what is installed may be older than pyproject.toml
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = doctor.dependencies(doctor._stated())
    assert found.keys() == doctor.PURPOSES.keys()
    assert sum(extra is None for extra in found.values()) == len(project["dependencies"])
    narrower = {"tensorrt10", "tensorrt11"}  # one major version of what `tensorrt` asks for
    assert {extra for extra in found.values() if extra} == project["optional-dependencies"].keys() - {"dev", "docs"} - narrower
    stated = ["SciPy>=1.11; extra == 'fit'", "torch", "ruff; extra == 'dev'"]
    assert doctor.dependencies(stated) == {"torch": None, "scipy": "fit"}


def test_every_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    folders = ("docs", "rescompress", "compress", "export", "edge_targets")
    files = [ROOT / "README.md", *(p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in {".md", ".py"})]
    named = {name for p in files for name in re.findall(r"rescompress\[([a-z,-]+)\]", p.read_text(encoding="utf-8"))}
    assert "rtx" in named
    assert {extra for part in named for extra in part.split(",")} <= extras.keys()


def test_a_foreign_sibling_is_named(tmp_path: Path) -> None:
    (tmp_path / "export.py").write_text("print('not ours')\n")
    for args in (("doctor",), ("targets",)):
        done = call(*args, cwd=tmp_path, code=4)
        assert str(tmp_path / "export.py") in done.stderr


def test_the_wheel_holds_our_four_packages_and_nothing_else() -> None:
    from setuptools import find_packages

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = find_packages(str(ROOT), include=settings["tool"]["setuptools"]["packages"]["find"]["include"])
    assert {name.partition(".")[0] for name in found} == {"rescompress", "compress", "export", "edge_targets"}
    folders = {p.parent for top in ("rescompress", "compress", "export", "edge_targets") for p in (ROOT / top).rglob("*.py")}
    on_disk = {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders}
    assert on_disk == set(found), "a folder with code lacks its __init__.py"


def test_a_plan_is_a_file_that_can_be_followed(rescompress: Command, tmp_path: Path) -> None:
    digits = str(DIGITS)
    made = json.loads(rescompress("prune", digits, "--macs", "0.6", "--plan-out", "plan.json", "--json", cwd=tmp_path).stdout)
    other = tmp_path / "other"
    other.mkdir()
    followed = json.loads(rescompress("prune", digits, "--plan-in", "../plan.json", "--json", cwd=other).stdout)
    assert followed["widths"] == made["widths"]
    assert followed["macs_after"] == made["macs_after"]
    assert followed["method"] == made["method"] == "magnitude"
    for again in (("--ratio", "0.1"), ("--method", "taylor"), ("--scope", "all"), ("--align", "3"), ("--drop-blocks",)):
        done = rescompress("prune", digits, "--plan-in", "../plan.json", *again, cwd=other, code=5)
        assert again[0].removeprefix("--").replace("-", "_") in done.stderr
    rescompress("prune", digits, "--plan-in", "../plan.json", "--recalibrate", cwd=other, code=5)
    rescompress("prune", digits, "--plan-in", "missing.json", cwd=other, code=5)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--data", "builtin:digits", "--finetune-epochs", "0"), "--finetune-epochs"),
        (("--data", "builtin:digits", "--finetune-epochs", "inf"), "--finetune-epochs"),
        (("--align", "0"), "--align"),
        (("--align", "²"), "--align"),
        (("--align", "7.5"), "--align"),
        (("--iterations", "3"), "--iterations"),
        (("--device", "cuda:99"), "--device"),
        (("--device", "tpu"), "--device"),
        (("-o", str(DIGITS)), str(DIGITS)),
    ],
)
def test_an_error_names_the_option_that_was_typed(
    rescompress: Command, tmp_path: Path, args: tuple[str, ...], named: str
) -> None:
    done = rescompress("prune", DIGITS, "--ratio", "0.3", *args, cwd=tmp_path, code=5)
    assert f"error: {named}:" in done.stderr
    assert not list(tmp_path.rglob("prune*"))


@pytest.mark.parametrize("seed", ["-1", "20000000000000"])
def test_a_seed_is_a_number_that_every_generator_takes(rescompress: Command, tmp_path: Path, seed: str) -> None:
    assert "--seed" in rescompress("prune", DIGITS, "--seed", seed, cwd=tmp_path, code=2).stderr


def test_the_table_of_a_command_is_about_one_network(rescompress: Command, tmp_path: Path) -> None:
    rescompress("prune", DIGITS, "--ratio", "0.5", "-o", "half.safetensors", cwd=tmp_path)
    tune = ("--data", "builtin:digits", "--epochs", "0.05", "--train-batch", "16")
    rows = rescompress("finetune", "half.safetensors", *tune, cwd=tmp_path).stdout
    assert [w for w in ("dense", "prune", "finetune") if w in rows] == ["dense", "prune", "finetune"]
    rescompress("prune", DIGITS, "--ratio", "0.7", cwd=tmp_path)
    rows = rescompress("finetune", DIGITS, *tune, cwd=tmp_path).stdout
    assert [w for w in ("dense", "prune", "finetune") if w in rows] == ["dense", "finetune"]
    rows = rescompress("finetune", "half.safetensors", *tune, "--seed", "1", cwd=tmp_path).stdout
    assert [w for w in ("dense", "prune", "finetune") if w in rows] == ["finetune"]


def test_what_is_stated_goes_into_the_config_and_from_there_into_the_run(rescompress: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.resnet50(num_classes=10).state_dict()
    del state["fc.bias"]
    torch.save(state, tmp_path / "net.pt")
    stated = ("--input", "3x32x32", "--preprocess", "half", "--arch-option", "head_bias=no", "--arch-option", "stride_at=0")
    assert "head_bias=no" in rescompress("init", "net.pt", "--data", "builtin:digits", cwd=tmp_path, code=5).stderr
    rescompress("init", "net.pt", "--data", "builtin:digits", *stated, cwd=tmp_path)
    config = load_config(tmp_path / "rescompress.yaml")
    opening = Opening(Path(config.checkpoint), (3, 32, 32), config.preprocess, config.arch_words)
    assert config.input == "3x32x32"
    spec = opening.load().spec
    assert (spec.input_shape, spec.preprocessing.name) == ((3, 32, 32), "half")
    assert {b.stride_at for b in spec.blocks if b.stride > 1} == {0}
    teacher = opening.of(opening.path)
    assert teacher.load().spec == spec
    assert dataclasses.replace(opening, arch_options=("weights=ema", "stride_at=0")).of(Path("t")).arch_options == (
        "stride_at=0",
    )
    (tmp_path / "yes.yaml").write_text(
        "checkpoint: net.pt\ndata: builtin:digits\narch_options: {head_bias: no, stride_at: 0}\n"
    )
    assert load_config(tmp_path / "yes.yaml").arch_words == ("head_bias=no", "stride_at=0")


def test_every_command_reads_a_shape_and_an_architecture_option_alike(rescompress: Command, tmp_path: Path) -> None:
    spec = load_checkpoint(DIGITS).spec
    torch.save(build_model(spec).state_dict(), tmp_path / "raw.pt")
    data = ("--data", "builtin:digits")
    stated = ("--input", "*".join(map(str, spec.input_shape)), "--arch-option", " arch = foo")
    assert "foo" in rescompress("inspect", "raw.pt", *stated, cwd=tmp_path).stdout
    rescompress("evaluate", "raw.pt", *data, *stated, cwd=tmp_path)
    rescompress("init", "raw.pt", *data, *stated, cwd=tmp_path)
    assert load_config(tmp_path / "rescompress.yaml").arch_words == ("arch=foo",)
    for command in (("inspect", "raw.pt"), ("evaluate", "raw.pt", *data), ("init", "raw.pt", "--force")):
        assert "3x70000x8" in rescompress(*command, "--input", "3x70000x8", cwd=tmp_path, code=5).stderr
        assert "NAME=VALUE" in rescompress(*command, "--arch-option", "arch", cwd=tmp_path, code=5).stderr
    assert Opening(DIGITS, arch_options=(" root = x", "stride_at=0")).of(DIGITS).arch_options == ("stride_at=0",)


def test_what_is_stated_of_a_network_holds_for_its_teacher(rescompress: Command, tmp_path: Path) -> None:
    spec = load_checkpoint(DIGITS).spec
    torch.save(build_model(spec).state_dict(), tmp_path / "raw.pt")
    stated = ("--input", "x".join(map(str, spec.input_shape)), "--data", "builtin:digits")
    tune = ("--epochs", "0.05", "--train-batch", "16")
    rescompress("finetune", "raw.pt", "--teacher", "raw.pt", *tune, *stated, cwd=tmp_path)
    drawn = rescompress("sensitivity", "raw.pt", *stated, "--preprocess", "half", "--calib", "8", "--json", cwd=tmp_path)
    assert json.loads(drawn.stdout)["groups"]


def test_a_latency_budget_is_met_on_the_target_that_has_a_model(rescompress: Command, tmp_path: Path) -> None:
    digits = str(DIGITS)
    budget = ("--latency", "0.8", "--data", "builtin:digits", "--calib", "128")
    made = json.loads(rescompress("prune", digits, *budget, "-t", "jetson", "--json", cwd=tmp_path).stdout)
    assert made["dropped_blocks"], "so small a network is bound by the number of its kernels: blocks have to go"
    assert made["top1_after"] > 0.9
    words = rescompress("prune", digits, *budget, "-t", "jetson", cwd=tmp_path).stdout
    assert f"{len(made['dropped_blocks'])} whole blocks" in words
    assert "predicted" in words
    rescompress("export", "-t", "jetson", "-t", "cpu", cwd=tmp_path, code=5)
    rescompress("prune", digits, "--latency", "0.9", cwd=tmp_path, code=5)
    rescompress("prune", digits, "--latency", "0.9", "-t", "cpu", cwd=tmp_path, code=5)
