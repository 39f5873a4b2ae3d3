"""Editing in place, filling in, choosing, and output that is valid by construction."""
