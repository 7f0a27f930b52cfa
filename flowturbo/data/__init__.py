"""Images and their classes, on disk and in batches; all randomness by key."""
