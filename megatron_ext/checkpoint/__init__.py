"""Read checkpoints without running their pickles."""
