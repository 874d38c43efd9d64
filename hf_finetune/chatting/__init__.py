"""Talking to a finished run: answers as they are written, or labels for what is typed."""
