"""The embedded world: pictures we draw, captions, an oracle, and the training of its pipeline."""
