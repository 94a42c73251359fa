"""A run under way: the loop, and what watches over it."""
