"""The training of the embedded model and of its oracle, and the model's card."""
