"""Load the base model, make it faster with the same numbers, and bound its memory."""
