"""Print the oldest versions that pyproject.toml promises, as constraints for pip.

python .ci/oldest.py [NAME ...]    # without these
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in map(Requirement, [*project["dependencies"], *extras["test"]]):
    (oldest,) = (s.version for s in requirement.specifier if s.operator == ">=")
    if requirement.name not in sys.argv[1:]:
        print(f"{requirement.name}=={oldest}")
