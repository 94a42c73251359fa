"""A run in progress: the training loop, and what watches over it."""
