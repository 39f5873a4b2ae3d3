"""How a canvas becomes tokens: token ids only, no strings, no terminal."""
