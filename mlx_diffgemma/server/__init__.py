"""One model in memory for every client at once: an engine, and the protocols that reach it."""
