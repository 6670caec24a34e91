"""Adapters: where they are stored, which there are, whether they are sound, and the copy on disk."""
