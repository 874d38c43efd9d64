"""What the PEFT methods share: target modules, initialisation, and files that load on the unmodified base."""
