"""The exercises that teach and examine the demo's model."""
