"""Files: models opened and checked, weights, pictures, whole files."""
