"""The model card of `adapter/`: what it is, how it did, what its limits are, and code that loads it."""
