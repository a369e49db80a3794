"""Grids of runs: the file, the plan, and the runner that goes on where it stopped."""
