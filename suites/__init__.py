"""What is measured on a frozen checkpoint: features, protocols, suite definitions."""
