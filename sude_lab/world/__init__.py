"""The drawn world: pictures we draw, an oracle that reads them, subjects, and an exact mixture."""
