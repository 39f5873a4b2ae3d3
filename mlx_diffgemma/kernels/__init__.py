"""Fused operations, each as Metal source and as a plain-MLX twin; `dispatch` says which runs."""
