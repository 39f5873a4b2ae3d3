"""Two small models that are shipped with the package: one solves sudokus, one reads pictures of
them."""
