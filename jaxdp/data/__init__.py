"""Turns documents into batches: `sources` -> `cache` (on disk) -> `sequences` -> `pipeline`."""
