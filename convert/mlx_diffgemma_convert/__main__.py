"""`python -m mlx_diffgemma_convert`."""

from mlx_diffgemma_convert.cli import main

main()
