"""The blocks of a recipe, strict reading of its file, and messages about its mistakes. Imports no torch."""
