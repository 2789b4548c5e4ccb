"""Settings: one object per engine, and what is made of its fields: options, keys of a config, tables, the starter config.

The properties hold for every field of every settings object, so that a new field is covered by being there.
"""

from __future__ import annotations

import importlib
import inspect
import runpy
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
import yaml
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from rescompress.cli.app import COMMANDS
from rescompress.cli.from_settings import Options, settings_from, with_options
from rescompress.core.described import (
    bound,
    choices_of,
    counts,
    default_of,
    duration,
    flag_of,
    help_of,
    parts_of,
    plain,
    table,
)
from rescompress.core.errors import BadInput, ConfigError
from rescompress.core.settings import (
    DeploySettings,
    ExportSettings,
    PruneSettings,
    QuantizeSettings,
    Section,
    SensitivitySettings,
    TrainSettings,
)
from rescompress.runs.config import RunConfig, validate
from rescompress.runs.starter import starter_config
from rescompress.show.gate.limits import Limits

ROOT = Path(__file__).parents[1]
COMMANDS_OF = {
    "prune": [PruneSettings, TrainSettings],
    "finetune": [TrainSettings],
    "quantize": [QuantizeSettings],
    "export": [ExportSettings],
    "sensitivity": [SensitivitySettings],
    "gate": [Limits],
    "deploy": [DeploySettings],
}
"""The commands whose options are made from settings objects."""


def command_of(name: str) -> Any:
    module = importlib.import_module(f"rescompress.cli.{COMMANDS[name][0]}")
    built: Any = typer.main.get_command(module.app)
    return getattr(built, "commands", {}).get(name, built)


def made_from_settings(command: str) -> Iterator[tuple[type[BaseModel], str, str]]:
    """Yield class, field and parameter of each option of a command that is made from a field."""
    if command not in COMMANDS_OF:
        return
    function = inspect.unwrap(getattr(importlib.import_module(f"rescompress.cli.{COMMANDS[command][0]}"), command))
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind, *more = get_args(parameter.annotation) or (None,)
        for options in (m for m in more if isinstance(m, Options) and not is_dataclass(kind)):
            for name in options.fields(kind):
                yield kind, name, options.flag(kind, name).name.removeprefix("--").replace("-", "_")


FIELDS = [pytest.param(c, *row, id=f"{c}-{row[1]}") for c in COMMANDS_OF for row in made_from_settings(c)]


def other_value(model: type[BaseModel], name: str) -> tuple[list[str], object]:
    """Return words for an option, without its name, and the value that they stand for, which is not the default."""
    field, flag = model.model_fields[name], flag_of(model, name)
    kind, bounds = next((k, b) for k, b in parts_of(field) if k is not type(None))
    usual = default_of(field)
    if flag.parse is duration:
        return ["90s"], 90
    if flag.parse is counts:
        return ["2,8"], (2, 8)
    if flag.file or name == "method":
        return ["other"], ("other",) if name == "photo" else "other"
    if name == "device":
        return ["cpu"], "cpu"
    if choices := [c for k, _ in parts_of(field) for c in choices_of(k)]:
        other = next((c for c in reversed(choices) if c != usual), None)
        if other is not None:
            return [other], other
    if kind is bool:
        return [], not usual
    numbers = [(k, b) for k, b in parts_of(field) if k in (int, float)]
    if numbers:
        kind, bounds = numbers[0]
        low = bound(bounds, "ge") if bound(bounds, "ge") is not None else bound(bounds, "gt") or 0.0
        high = bound(bounds, "le") or bound(bounds, "lt") or (low or 0.0) + 20.0
        made = kind((low or 0.0) + (high - (low or 0.0)) * 0.37)
        value = made if made != usual else kind((low or 0.0) + (high - (low or 0.0)) * 0.41)
        return [str(value)], value
    return ["word"], "word"


def words_of(option: Any) -> list[str]:
    """Return the words that an option takes, as typer before and since 0.29 keeps them."""
    choices = option.type.choices if hasattr(option, "type") else option.type_descriptor.annotation
    return [str(getattr(c, "value", c)) for c in choices]


@pytest.mark.parametrize(("command", "model", "name", "word"), FIELDS)
def test_every_field_has_an_option_with_its_help_its_words_and_its_bounds(
    command: str, model: type[BaseModel], name: str, word: str
) -> None:
    option = next(p for p in command_of(command).params if p.name == word)
    assert option.help.replace("\\", "").startswith(plain(help_of(model)[name]).removesuffix("."))
    assert option.default is None
    kinds = [kind for kind, _ in parts_of(model.model_fields[name]) if kind is not type(None)]
    choices = [choice for kind in kinds for choice in choices_of(kind)]
    if all(choices_of(kind) for kind in kinds):
        assert words_of(option) == choices
    for kind, bounds in parts_of(model.model_fields[name]):
        if kind is int and kinds == [int] and flag_of(model, name).parse is None:
            kept = getattr(option, "type", option)  # typer 0.29 has the bounds in the option itself
            assert (kept.min, kept.max) == (bound(bounds, "ge"), bound(bounds, "le"))


@pytest.mark.parametrize(("command", "model", "name", "word"), FIELDS)
def test_what_is_typed_arrives_in_the_object_and_counts_as_given(
    command: str, model: type[BaseModel], name: str, word: str
) -> None:
    words, value = other_value(model, name)
    seen: list[Any] = []
    app = typer.Typer()
    options = Options()

    def probe(settings: Any) -> None:
        seen.append(settings)

    probe.__annotations__["settings"] = Annotated[model, options]
    app.command()(with_options(probe))
    flag = flag_of(model, name)
    typed = flag.name if words or value else flag.off or "--no-" + flag.name.removeprefix("--")
    found = CliRunner().invoke(app, [typed, *words])
    budgets = {"max_divergence", "max_slowdown", "patience"}
    if name in budgets:  # which need another setting
        assert isinstance(found.exception, BadInput)
        assert found.exception.where == "options"
        return
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert found.exit_code == 0, found.output
    assert getattr(seen[0], name) == value
    assert seen[0].model_fields_set == {name}


def test_without_options_the_object_is_the_default_and_nothing_counts_as_given() -> None:
    for models in COMMANDS_OF.values():
        for model in models:
            made = settings_from(model, Options(), {})
            assert made == model()
            assert made.model_fields_set == set()


def test_a_default_of_a_command_does_not_count_as_given() -> None:
    made = settings_from(QuantizeSettings, Options(instead={"mode": "ptq"}), {"calib": 7})
    assert made == QuantizeSettings(mode="ptq", calib=7)
    assert made.model_fields_set == {"calib"}


def test_an_impossible_value_names_its_option() -> None:
    for typed, where in (({"ratio": 1.5}, "--ratio"), ({"plan": "p", "method": "x"}, "options"), ({"align": "3.5"}, "--align")):
        with pytest.raises(BadInput) as caught:
            settings_from(PruneSettings, Options(), typed)
        assert caught.value.where == where


def test_a_value_of_several_kinds_is_refused_with_all_of_them() -> None:
    for align in ("0", "foo"):
        with pytest.raises(BadInput) as caught:
            settings_from(PruneSettings, Options(), {"align": align})
        assert caught.value.what == f"takes auto or a whole number at least 1 and at most 65,536 (given: '{align}')"


SECTIONS = [(s, m) for s, m in (("prune", PruneSettings), ("finetune", TrainSettings), ("quantize", QuantizeSettings))]


@pytest.mark.parametrize(("section", "model"), SECTIONS)
def test_a_section_of_a_config_is_the_object(section: str, model: type[Section]) -> None:
    made = getattr(validate({"checkpoint": "a", "data": "b", section: {}}, "test"), section)
    assert type(made) is model
    assert made == model()
    with pytest.raises(ConfigError, match="unknown key"):
        validate({"checkpoint": "a", "data": "b", section: {"no_such_setting": 1}}, "test")


def test_the_page_has_the_tables_that_the_fields_make() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "tables.py"))["page"]
    text = (ROOT / "docs" / "run.md").read_text()
    assert page(text) == text, "run `python docs/tables.py`"


def test_the_starter_config_holds_the_defaults(tmp_path: Path) -> None:
    document = yaml.safe_load(starter_config(None, None, None, tmp_path))
    config = RunConfig.model_validate(document)
    assert config.prune == PruneSettings(macs=0.5)
    assert config.finetune == TrainSettings()
    assert config.quantize == QuantizeSettings()


class Grown(PruneSettings):
    """A settings object with one more field.

    Attributes:
        patience: Days to wait.
    """

    patience: int = Field(3, ge=1, le=9)


def test_one_more_field_appears_everywhere() -> None:
    seen: list[Any] = []
    app = typer.Typer()

    @app.command()
    @with_options
    def probe(settings: Annotated[Grown, Options()]) -> None:
        seen.append(settings)

    assert "Days to wait." in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert CliRunner().invoke(app, ["--patience", "5", "--macs", "0.4"]).exit_code == 0
    assert (seen[0].patience, seen[0].macs, seen[0].model_fields_set) == (5, 0.4, {"patience", "macs"})
    assert CliRunner().invoke(app, ["--patience", "10"]).exit_code == 2
    assert "| `patience` | Days to wait. | 3 | a whole number at least 1 and at most 9 |" in table(Grown)
    assert "patience" in Grown().model_dump()


def test_a_field_without_a_line_is_found() -> None:
    class Mute(Section):
        """Says nothing."""

        setting: int = 1

    with pytest.raises(AssertionError, match="setting"):
        help_of(Mute)
