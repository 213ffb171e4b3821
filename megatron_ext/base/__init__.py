"""Ranks, log, text, files, values and placement: nothing of Megatron, nothing of policies."""
