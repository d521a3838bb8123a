"""Recipe, schedules, optimiser, and the one training loop."""
