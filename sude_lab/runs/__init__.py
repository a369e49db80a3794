"""Runs: a tuned subject as a folder, what it is exported as, what runs share."""
