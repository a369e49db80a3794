"""What makes `data/results` and the embedded model; run from a clone: python -m studies.NAME."""
