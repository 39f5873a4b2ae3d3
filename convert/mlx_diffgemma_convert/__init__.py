"""Turns Hugging Face weights of DiffusionGemma into quantized MLX form."""
