"""Parts that PEFT methods share: target modules, initialisation, and files that load on the unmodified base."""
