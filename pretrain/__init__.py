"""Ground floor: how a checkpoint is made. Data, views, models, methods, the training loop, checkpoint files."""
