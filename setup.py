"""Settings are in pyproject.toml. This file copies the stored benchmark results that notebooks read into the wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithResults(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            for path in Path("benchmarks").glob("*/*.json"):
                target = Path(self.build_lib, "pwlib", "course", "stored", path.relative_to("benchmarks"))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithResults})
