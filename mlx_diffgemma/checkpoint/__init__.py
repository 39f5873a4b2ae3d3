"""From disk to a model and back."""
