"""`hf-finetune`, `python -m hf_finetune` and `accelerate launch -m hf_finetune`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while its modules are still being imported ends quietly, too."""
    try:
        from hf_finetune import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
