"""One model in memory and every client at once: the engine, and a file for each protocol."""
