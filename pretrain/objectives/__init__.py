"""What is minimised: targets, losses, and what they say about the prototypes."""
