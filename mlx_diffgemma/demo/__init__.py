"""A small model that solves sudokus, shipped with the package."""
