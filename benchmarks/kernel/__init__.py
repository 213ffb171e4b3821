"""The fused moment ops against what else can do the same work: ``python -m benchmarks.kernel``."""
