raise SystemExit("the script of a data set was run")
