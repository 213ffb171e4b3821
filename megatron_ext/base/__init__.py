"""Ranks, log, text, files, values and placement. Knows neither Megatron nor policies."""
