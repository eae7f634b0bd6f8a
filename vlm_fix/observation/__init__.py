"""observe: what a model attends to while it answers."""
