"""Where jobs run: one file a kind of place."""
