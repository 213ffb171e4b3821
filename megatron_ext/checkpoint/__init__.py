"""What a checkpoint stores, read without running its pickles."""
