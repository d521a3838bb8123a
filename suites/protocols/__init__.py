"""How to measure: one file per protocol, the file name is its name (see protocol.py for the contract)."""
