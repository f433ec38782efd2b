"""Training: the step, losses, checkpoints."""
