"""The Trainer with the loss of the global batch, bit-exact resume and the agreed stop."""
