"""Inspect, compare, edit, convert and plan from a checkpoint: no ranks, no model."""
