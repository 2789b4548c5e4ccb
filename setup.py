"""What pyproject.toml cannot say: the demo's config and network lie in `examples/`, and the wheel carries them, too."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

EXAMPLES = Path(__file__).parent / "examples"
DEMOS = ("demo.yaml", "quickstart.yaml")  # as `rescompress.cli.demo` looks for them


class BuildPy(build_py):
    """Copies the demo into the package that is built, where `rescompress demo` looks for it first."""

    def _demo(self) -> list[tuple[Path, Path]]:
        if self.editable_mode:  # the checkout is there
            return []
        folder = Path(self.build_lib) / "rescompress" / "demo"
        for config in (EXAMPLES / name for name in DEMOS if (EXAMPLES / name).is_file()):
            network = re.search(r"^checkpoint: *(\S+)", config.read_text(encoding="utf-8"), re.M)
            if network is not None and (EXAMPLES / network[1]).is_file():
                return [(source, folder / source.name) for source in (config, EXAMPLES / network[1])]
        raise FileNotFoundError("no demo with its network in examples/")

    def run(self) -> None:
        """Build as usual, then copy."""
        super().run()
        for source, place in self._demo():
            self.mkpath(str(place.parent))
            self.copy_file(str(source), str(place))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return every file that is built."""
        return [*super().get_outputs(include_bytecode), *(str(place) for _, place in self._demo())]


setup(cmdclass={"build_py": BuildPy})
