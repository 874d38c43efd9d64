"""`hf-finetune`, `python -m hf_finetune` and `accelerate launch -m hf_finetune`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while its modules are still being imported ends quietly, too."""
    try:
        from hf_finetune.cli import main as cli_main
    except KeyboardInterrupt:
        sys.exit(130)
    cli_main.main()


if __name__ == "__main__":
    main()
