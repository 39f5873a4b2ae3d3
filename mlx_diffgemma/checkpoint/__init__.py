"""Checkpoints and adapters on disk: their names, formats and sizes, and how they are loaded."""
