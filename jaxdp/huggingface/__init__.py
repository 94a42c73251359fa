"""Models of Hugging Face transformers: folders to start from, and folders to export."""
