"""Reports, model cards and comparisons, made from run folders."""
