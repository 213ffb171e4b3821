"""What the user asks for: flags, YAML, presets, phases and counters. No torch."""
