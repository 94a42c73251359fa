"""From documents to batches: `sources` -> `cache` (on disk) -> `sequences` -> `pipeline`."""
