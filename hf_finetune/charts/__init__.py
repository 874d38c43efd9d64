"""Charts of what a model learned: `drawing` makes PNG and SVG of figures, `predictions` and `runs` make the figures."""
