"""Predictions about a run before it starts: memory, time per step, scaling."""
