"""This package's calls into Megatron: names, arguments, classes and the schedule."""
