"""Write docs/images/report.png: the top of a run's report, as a headless Chromium shows it.

Usage: python docs/screenshot.py RUN_FOLDER
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rescompress.show.report.history import load_runs
from rescompress.show.report.html import page

IMAGE = Path(__file__).parent / "images" / "report.png"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def main() -> None:
    """Render the report of the run and photograph it."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        sys.exit("no Chromium is installed")
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "report.html"
        html.write_text(page(load_runs([Path(sys.argv[1])])), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1240,1560"]
        IMAGE.parent.mkdir(exist_ok=True)
        subprocess.run([program, *options, f"--screenshot={IMAGE}", html.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
