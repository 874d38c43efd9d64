"""Recipe blocks, strict reading of recipe files, and every mistake in them as a sentence; no torch."""
