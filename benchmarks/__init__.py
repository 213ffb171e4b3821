"""Benchmarks: programs that measure this package and keep what they measured."""
