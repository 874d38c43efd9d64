"""A finished run: evaluate, predict, chat, merge, export."""
