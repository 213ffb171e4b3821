"""What this package asks of Megatron: names, arguments, classes and the schedule."""
