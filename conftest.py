"""What tests and notebooks share, whichever of them pytest is given."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores: threads of theirs only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for notebooks' kernels, too
