"""The entry point of a job: as many processes as this node has devices, and one truthful exit code.

    python -m hf_finetune.launch RECIPE [key.path=value ...]      what `hf-finetune train` takes

It is told where it runs by the variables that torchrun knows, all of them optional:

    PET_NPROC_PER_NODE    processes of this node: a number, or `auto`: one a visible GPU, one on a CPU
    PET_NNODES            nodes; 1 by default
    PET_NODE_RANK         which of them this one is, from 0
    PET_MASTER_ADDR       address of the first one, needed by more than one node
    PET_MASTER_PORT       a port that is open there; 29500 by default
    HF_FINETUNE_LAUNCHER_CONFIG    a configuration of accelerate, e.g. accelerate_configs/fsdp2.yaml; plain DDP without

One process in all takes the place of this one. Several are started by accelerate's own launcher, inside this process,
which hands SIGTERM, SIGINT and SIGUSR1 to them once and waits for as long as their checkpoint takes. The exit code is
what `status.json` says, else that of the process that failed first; that of a signal is 128 and its number.
"""
