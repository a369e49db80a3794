"""Measuring pictures of runs: metrics, encoders, DreamBench, tables."""
