"""Training: the training step, losses and checkpoints."""
