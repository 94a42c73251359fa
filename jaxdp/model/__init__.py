"""The transformer, and sampling text from it; nothing here depends on devices."""
