"""The classifier of eq. 5 as a tool: which prompt fits a picture, and what a model answers."""
