"""Time and memory of the commands that read a checkpoint's metadata, at a trillion parameters."""
