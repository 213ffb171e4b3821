"""The wrappers of Megatron's functions, through which Megatron calls this package."""
