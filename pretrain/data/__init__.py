"""Images: data sets by name, evaluation transforms, and the views a method trains on."""
