"""Write `licences.md`: the licence of every package that rescompress needs or may use, read off what is installed.

python docs/licences.py          packages that are not installed here keep the line they have
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("licences.md")
HEAD = """# Licences

rescompress is [Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0). It contains no code of others; what it needs is
installed beside it. This page lists what each package says of itself, as `python docs/licences.py` reads it where the packages
are installed (`needed`: pip installs it with rescompress; otherwise the extra that asks for it). Packages that these ask for
in turn, such as NVIDIA's CUDA libraries below torch's default build, come under licences of their own: `pip-licenses` lists
those in your environment. Weights that are fetched by name have licences, too: they are read off the card and stand in the
manifest ([checkpoints](checkpoints.md#names-instead-of-files)).

| package | licence | for |
|---|---|---|
"""
_KNOWN = {
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "BSD License": "BSD",
    "The Unlicense (Unlicense)": "Unlicense",
}


def licence_of(name: str) -> str | None:
    """Return what a package says of its licence, or None where it is not installed."""
    try:
        found = metadata(name)
    except PackageNotFoundError:
        return None
    expression = found.get("License-Expression")
    classes = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier") or () if c.startswith("License ::")]
    text = found.get("License") or ""
    stated = expression or ", ".join(_KNOWN.get(c, c) for c in classes if c != "OSI Approved")
    first = text.strip().splitlines()[0] if text.strip() else ""
    return (stated or first or "not stated")[:80].replace("|", "/")


def main() -> None:
    """Write the page."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    purposes: dict[str, str] = {Requirement(r).name.lower(): "needed" for r in project["dependencies"]}
    for extra, some in project["optional-dependencies"].items():
        for requirement in some if extra not in ("dev", "docs") else ():
            purposes.setdefault(Requirement(requirement).name.lower(), f"extra `{extra}`")
    old = dict(re.findall(r"^\| (\S+) \| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.M)) if PAGE.is_file() else {}
    rows = [
        f"| {name} | {licence_of(name) or old.get(name) or 'not stated'} | {why} |" for name, why in sorted(purposes.items())
    ]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{PAGE}: {len(rows)} packages")


if __name__ == "__main__":
    main()
