"""Hugging Face models: loading folders to start a run from, and exporting runs as folders."""
