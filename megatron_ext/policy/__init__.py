"""The user's request: flags, YAML, presets, phases and counters. No torch."""
