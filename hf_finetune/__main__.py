"""`python -m hf_finetune` and `accelerate launch -m hf_finetune`."""

from hf_finetune.cli import main

if __name__ == "__main__":
    main()
