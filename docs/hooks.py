"""Hooks of MkDocs: the navigation in the order of the index, files from beside the docs, and the schemas as they are now."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "AGENTS.md")
"""Pages of the repository's root that belong to the site."""
FOLDERS = ("examples/ci", "examples/notebooks")
"""Files that pages link to as they are."""


def on_config(config: Any, **_: Any) -> Any:
    """Build the navigation: tutorials and pages as the index has them, then decisions by number."""
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    linked = list(dict.fromkeys(re.findall(r"\]\(((?:tutorials/)?[\w-]+\.md)\)", index)))
    config.nav = [
        {"Start": "README.md"},
        {"Tutorials": [page for page in linked if page.startswith("tutorials/")]},
        {"Pages": [page for page in linked if not page.startswith("tutorials/")]},
        {"Project": list(BESIDE)},
        {"Schemas": "schemas.md"},
        {"Decisions": [f"decisions/{path.name}" for path in sorted((DOCS / "decisions").glob("*.md"))]},
    ]
    return config


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add what lies beside the docs, and a page of every JSON Schema."""
    for name in BESIDE:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(
            File.generated(config, name, content=text.replace("](docs/", "](").replace("](README.md)", "](README.md)"))
        )
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*")):
            if path.is_file():
                files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    sys.path.insert(0, str(ROOT))
    from rescompress.show.documents import SCHEMAS, described, schema_of

    lines = ["# JSON Schemas", "", "`rescompress schema NAME` prints the same.", "", "| document | what it is |", "|---|---|"]
    lines += [f"| [{row['name']}](schemas/{row['name']}.json) | {row['description']} |" for row in described()]
    for name in SCHEMAS:
        files.append(File.generated(config, f"schemas/{name}.json", content=json.dumps(schema_of(name), indent=1) + "\n"))
    files.append(File.generated(config, "schemas.md", content="\n".join(lines) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to files of the repository to their copies in the site."""
    up = "../" * page.file.src_path.count("/")
    beside = "|".join(re.escape(name) for name in ("examples/", *BESIDE))
    return re.sub(rf"\]\({re.escape(up)}\.\./(?={beside})", f"]({up}", markdown)
