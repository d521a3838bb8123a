"""The methods, one file each; `method.py` holds their contract with the training loop."""
