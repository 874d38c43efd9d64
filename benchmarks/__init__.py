"""What this project measures of itself; each script says in its docstring how it is run."""
