"""`python -m sude_lab` is `sude-lab`."""

import sys

from sude_lab.cli import main

sys.exit(main())
