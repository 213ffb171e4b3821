"""What the loss does after a phase change: ``python -m benchmarks.transition``."""
