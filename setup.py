"""The wheel carries the embedded models; everything else is said in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithData(build_py):
    """Copy what the commands read from `data/` into the package; an editable one reads it there."""

    shipped = (
        *("embedded", "embedded_flow", "oracle", "grids", "bench", "attribute_prompts.yaml"),
        *("results/fair.csv", "results/fair_development.csv"),  # `bench` draws them beside its own
    )

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in self.shipped:
            source, target = Path("data", name), Path(self.build_lib, "sude_lab", "data", name)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": WithData})
