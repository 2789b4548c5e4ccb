"""The run's config: what is read, and how a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantize_zoo import checkpoint_of

from rescompress.cli.options import Stated
from rescompress.core.errors import ConfigError
from rescompress.runs.config import load_config
from rescompress.runs.stage import Opening
from rescompress.runs.starter import starter_config

GOOD = "checkpoint: net.pt\ndata: builtin:digits\nprune: {macs: 0.5}\nquantize: {mode: ptq}\ntargets: [cpu]\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_paths_and_overrides(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ("prune.macs=0.3", "finetune.epochs=5", "quantize=null", "seed=7"))
    assert config.checkpoint == str(tmp_path / "net.pt")
    assert config.data == "builtin:digits"
    assert config.prune is not None
    assert config.prune.budget == ("macs", 0.3)
    assert config.finetune is not None
    assert config.finetune.epochs == 5
    assert config.quantize is None
    assert config.seed == 7


def test_every_path_is_relative_to_the_file(tmp_path: Path) -> None:
    text = (
        "checkpoint: net.pt\ndata: photos\nprune: {plan: plan.json}\nfinetune: {teacher: big.pt}\nquantize: {teacher: none}\n"
    )
    config = load_config(write(tmp_path, text))
    assert config.prune is not None
    assert config.finetune is not None
    assert config.quantize is not None
    places = [config.checkpoint, config.data, config.prune.plan, config.finetune.teacher]
    assert places == [str(tmp_path / name) for name in ("net.pt", "photos", "plan.json", "big.pt")]
    assert config.quantize.teacher == "none"


@pytest.mark.parametrize("name", ["net.pt", "net #2.pt", "a: b/n.pt", "'quoted' \\ name.pt", "- x", "2024", "ünïcode.pt"])
def test_the_config_that_is_written_names_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = starter_config(None, str(path), None, tmp_path).replace("CHANGE-ME.pt", "net.pt")
    assert load_config(write(tmp_path, text)).data == str(path)


@pytest.mark.parametrize("name", ["modèle.py", "my net.py", "a: b/#net.py", 'quo"ted.py', "line\nbreak.py"])
def test_code_is_named_relative_to_the_config_that_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Opening, "load", lambda self, tell=None: checkpoint_of("pad"))
    monkeypatch.chdir(tmp_path)
    stated = Stated(code=f"code/{name}:make")
    text = starter_config(stated.opening(Path("net.pt")), "photos", None, Path("sub"))
    assert "code: " not in text
    assert f'"../code/{name}:make"' in text or not name.isprintable() or '"' in name
    assert str(tmp_path) not in text
    (tmp_path / "elsewhere" / "sub").mkdir(parents=True)
    read = load_config(write(tmp_path / "elsewhere" / "sub", text))
    assert read.arch_options["code"] == f"{tmp_path / 'elsewhere' / 'code' / name}:make"


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        (GOOD + "prun: {}\n", "unknown key 'prun'", "'prune'"),
        (GOOD.replace("macs: 0.5", "mcas: 0.5"), "unknown key 'prune.mcas'", "'macs'"),
        (GOOD.replace("macs: 0.5", "macs: 1.5"), "prune.macs", "correct"),
        (GOOD.replace("macs: 0.5", "macs: 0.5, ratio: 0.3"), "ratio and macs are budgets", "correct"),
        (GOOD.replace("mode: ptq", "mode: ptqq"), "quantize.mode", "correct"),
        (GOOD + "batch: 0\n", "batch: takes dynamic or a whole number at least 1 and at most 65,536 (given: 0)", "correct"),
        (
            GOOD + "finetune: {lr: fast}\n",
            "finetune.lr: takes a number above 0 and at most 1,000 or auto (given: 'fast')",
            "correct",
        ),
        (GOOD.replace("[cpu]", "cpu"), "targets: takes a list, such as [cpu] (given: 'cpu')", "correct"),
        (GOOD.replace("[cpu]", "[1]"), "targets.0", "correct"),
        (GOOD + "batch: 1000000000\n", "batch", "correct"),
        (GOOD + "finetune: {epochs: 1.0e+300}\n", "finetune.epochs", "correct"),
        (GOOD + "finetune: {temperature: 1.0e+300}\n", "finetune.temperature", "correct"),
        (GOOD + "finetune: {batch_size: 1000000000000}\n", "finetune.batch_size", "correct"),
        (GOOD.replace("[cpu]", f"[{', '.join(['cpu'] * 101)}]"), "targets", "correct"),
        (GOOD + f"targets: [{', '.join(['cpu'] * 200_000)}]\n", "lines or values", "init"),
        (GOOD.replace("data: builtin:digits\n", ""), "'data' is missing", "data: ..."),
        ("- a\n- b\n", "no mapping", "init"),
        ("a: [", "no YAML", "init"),
    ],
)
def test_mistakes_name_the_place_and_the_remedy(tmp_path: Path, text: str, message: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert message in caught.value.what
    assert caught.value.remedy is not None
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == 5


def test_a_missing_file_and_bad_overrides(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    for override in ("prune.macs", "seed.x=1", "prune.macs=[", "=3"):
        with pytest.raises(ConfigError):
            load_config(write(tmp_path, GOOD), (override,))
