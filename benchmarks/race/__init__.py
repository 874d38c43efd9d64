"""hf_finetune against its peers: same model, data, adapter, batch and samples, one table out.

    python -m benchmarks.race --quick             generated data and small models: at most ten minutes on two cores
    python -m benchmarks.race --sst2 FOLDER --gsm8k FOLDER --llama FOLDER      every row; may take hours

`workloads` says what is trained, `systems` who trains it, `environments` installs the peers, `runner` runs and watches
one of them, `results` keeps what came of it, `race` puts all runs in order and within a time, `summary`, `goals` and
`table` say how they compare and what was aimed at. Scripts in `peers` run in an
environment of their own and share no code with hf_finetune; nor does anything here.
"""
