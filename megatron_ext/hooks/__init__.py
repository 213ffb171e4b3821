"""Where Megatron calls this package, and the one object with the state of the process."""
