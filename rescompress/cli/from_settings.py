"""Options of the command line made from the fields of settings objects.

A command asks for a settings object like for anything else, ``settings: Annotated[PruneSettings, Options()]``; `with_options`
puts in its place one Typer option for each field, and calls the command with the object that the given ones make. What is
wrong with a value is named as the option that holds it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel, ValidationError

from rescompress.core.described import (
    Flag,
    bound,
    choices_of,
    default_of,
    flag_of,
    help_of,
    parts_of,
    plain,
    range_of,
    wrong_value,
)
from rescompress.core.errors import BadInput


@dataclass(frozen=True)
class Options:
    """Which fields of a settings object a command has options for, and where it is of another mind than a config.

    Attributes:
        instead: Defaults of the command that are not those of the fields.
        flags: How a field is typed, where it is not as the field itself says.
        only: The fields, all by default.
    """

    instead: Mapping[str, object] = field(default_factory=dict)
    flags: Mapping[str, Flag] = field(default_factory=dict)
    only: tuple[str, ...] = ()

    def fields(self, model: type[BaseModel]) -> tuple[str, ...]:
        """Return the fields that have an option."""
        return self.only or tuple(model.model_fields)

    def flag(self, model: type[BaseModel], name: str) -> Flag:
        """Return how a field is typed here."""
        return self.flags.get(name) or flag_of(model, name)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with an option for every field of the settings objects among its parameters.

    Args:
        command: Its parameters that are annotated with ``Annotated[SettingsClass, Options(...)]`` are made from options; of a
            dataclass the fields are parameters as they stand, each annotated with its option.
    """
    parameters: list[inspect.Parameter] = []
    made: dict[str, tuple[type[BaseModel], Options]] = {}
    groups: dict[str, tuple[type[Any], list[inspect.Parameter]]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, *more = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else (None,)
        options = next((m for m in more if isinstance(m, Options)), None)
        if options is None:
            parameters.append(parameter)
            continue
        if is_dataclass(kind):
            members = _members(cast(type[Any], kind), options.only)
            groups[parameter.name] = cast(type[Any], kind), members
            parameters += members
            continue
        model = cast(type[BaseModel], kind)
        made[parameter.name] = model, options
        parameters += [_parameter(model, name, options) for name in options.fields(model)]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        for name, (model, options) in made.items():
            typed = {n: given.pop(_word(options.flag(model, n))) for n in options.fields(model)}
            given[name] = settings_from(model, options, {n: v for n, v in typed.items() if v not in (None, [])})
        for name, (group, members) in groups.items():
            given[name] = group(**{member.name: given.pop(member.name) for member in members})
        command(**given)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]  # one without a default may follow
    signature = inspect.Signature(parameters)
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def settings_from(model: type[BaseModel], options: Options, typed: Mapping[str, Any]) -> BaseModel:
    """Return a settings object; ``model_fields_set`` is what was typed.

    Args:
        model: Its class.
        options: Of the command.
        typed: By field, as Typer reads it.

    Raises:
        BadInput: A value is impossible, or two do not go together; its option is named.
    """
    values: dict[str, Any] = {}
    for name, value in typed.items():
        parse = options.flag(model, name).parse
        try:
            values[name] = parse(_plain(value)) if parse is not None else _plain(value)
        except BadInput as e:
            raise BadInput(e.what, where=options.flag(model, name).name, remedy=e.remedy) from e
    try:
        made = model(**{**options.instead, **values})
    except ValidationError as e:
        key, wrong = wrong_value(model, e)
        name = key.partition(".")[0]
        where = options.flag(model, name).name if name in model.model_fields else "options"
        raise BadInput(wrong, where=where, remedy="see --help") from e
    return model.model_construct(_fields_set=set(values), **dict(made))


def _plain(value: Any) -> Any:
    """Return what Typer read as what a config holds."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    return value.value if isinstance(value, StrEnum) else str(value) if isinstance(value, Path) else value


def _members(group: type[Any], only: tuple[str, ...]) -> list[inspect.Parameter]:
    """Return the parameters that the fields of a dataclass stand for."""
    hints = get_type_hints(group, include_extras=True)
    chosen = [f for f in fields(group) if f.name in (only or hints)]
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in chosen]


def _parameter(model: type[BaseModel], name: str, options: Options) -> inspect.Parameter:
    """Return the parameter of a command for a field; None stands for what was not typed."""
    info, flag = model.model_fields[name], options.flag(model, name)
    kind, limits = _kind(model, name, flag)
    usual: Any = options.instead.get(name, default_of(info))
    names, panel = [flag.name], flag.panel
    if kind is bool and (usual is not False or flag.off):
        names = [f"{flag.name}/{flag.off or '--no-' + flag.name.removeprefix('--')}"]
        usual = flag.name.removeprefix("--") if usual else None
        panel = panel or _SWITCHES
    shown = flag.usual or ("" if usual in (None, False, [], ()) else str(usual))
    option: Any = typer.Option(
        *names,
        *([flag.short] if flag.short else []),
        help=_help(model, name, limits),
        metavar=flag.metavar,
        show_default=shown or False,
        rich_help_panel=panel,
        autocompletion=flag.completes,
        **limits,
    )
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(_word(flag), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_SWITCHES = "On or off"
"""Panel of help for options of two names: among the others these would leave no room for names on 80 columns."""


def _word(flag: Flag) -> str:
    """Return the name of the parameter behind an option."""
    return flag.name.removeprefix("--").replace("-", "_")


def _kind(model: type[BaseModel], name: str, flag: Flag) -> tuple[Any, dict[str, Any]]:
    """Return the type of an option, and what Typer checks of it by itself: the ends of whole numbers."""
    parts = [(kind, bounds) for kind, bounds in parts_of(model.model_fields[name]) if kind is not type(None)]
    if flag.file:
        return (list[Path] if any(get_origin(kind) is tuple for kind, _ in parts) else Path), {}
    choices = [choice for kind, _ in parts for choice in choices_of(kind)]
    if len(choices) and all(choices_of(kind) for kind, _ in parts):
        return StrEnum(name, [(choice, choice) for choice in choices]), {}
    if flag.parse is not None:
        return str, {}
    kind, bounds = parts[0]
    if len(parts) > 1 or kind not in (bool, int, float, str):
        return (float if any(kind is float for kind, _ in parts) else str), {}
    if kind is int:
        ends = {"min": bound(bounds, "ge"), "max": bound(bounds, "le")}
        return int, {end: int(value) for end, value in ends.items() if value is not None}
    return kind, {}


def _help(model: type[BaseModel], name: str, limits: Mapping[str, Any]) -> str:
    """Return the help of a field, with the bounds that Typer does not show."""
    text = plain(help_of(model)[name])
    words = dict.fromkeys(range_of(bounds) for kind, bounds in parts_of(model.model_fields[name]) if kind in (int, float))
    ends = " or ".join(word for word in words if word) if not limits else ""
    return (f"{text.removesuffix('.')} ({ends})." if ends else text).replace("[", r"\[")
