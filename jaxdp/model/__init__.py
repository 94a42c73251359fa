"""The transformer and text drawn from it; nothing here knows of devices."""
