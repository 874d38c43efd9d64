"""The model card of `adapter/`: its metadata, how the model did, its limits, and code that loads it."""
