"""One file a PEFT method; `base.py` is the contract, `_*.py` what the methods share."""
