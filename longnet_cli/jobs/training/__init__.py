"""Training: a recipe, the optimizer and its schedule, and the loop. `train` is the one job here."""
