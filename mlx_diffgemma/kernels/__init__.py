"""Fused operations: Metal source, plain-MLX twin, and which of them runs."""
