"""What tests and notebooks share, whichever of them pytest is given."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores: threads of theirs only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for notebooks' kernels, too

# Lessons are run by kernels that start in their own folder; the studies lie beside the package.
_here = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_here, os.environ.get("PYTHONPATH"))))
