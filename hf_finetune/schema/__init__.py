"""What a recipe may say, how its file is read, and how its mistakes are told. Imports no torch."""
