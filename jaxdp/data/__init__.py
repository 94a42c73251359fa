"""From a corpus to batches: `sources` (documents) -> `cache` (tokens on disk) -> `sequences` -> `pipeline`."""
