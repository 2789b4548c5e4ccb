"""Writes the tables of docs/run.md: run it after a change of a setting."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from rescompress.core.described import members, table
from rescompress.runs.config import RunConfig

PAGE = Path(__file__).with_name("run.md")


def sections() -> dict[str, type[BaseModel]]:
    """Return the sections of a config by name, the config itself under no name."""
    found: dict[str, type[BaseModel]] = {"": RunConfig}
    for name, field in RunConfig.model_fields.items():
        kinds = [kind for kind, _ in members(field.annotation)]
        found.update((name, k) for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return found


def page(text: str) -> str:
    """Return the page with its tables made again.

    Args:
        text: As it stands.
    """
    config, heading, rest = text.partition("## The folder")
    parts = re.split(r"^(### \w+\n)", config, flags=re.M)
    for name, model in sections().items():
        at = parts.index(f"### {name}\n") + 1 if name else 0
        parts[at] = re.sub(r"^\| key \|(?:.*\n)(?:\|.*\n)+", lambda _, m=model: _linked(table(m)), parts[at], flags=re.M)
    return "".join(parts) + heading + rest


def _linked(text: str) -> str:
    """Return a text in which ``decision 36`` is a link."""
    files = {int(path.name[:4]): path.name for path in (PAGE.parent / "decisions").glob("0*.md")}
    return re.sub(r"\(decision (\d+)\)", lambda m: f"([decision {m[1]}](decisions/{files[int(m[1])]}))", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
