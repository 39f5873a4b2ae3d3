"""Benchmarks: how fast the model is, where the time goes, and what the device could do at best."""
