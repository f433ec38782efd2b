"""Fine-tuning from a configuration to a run folder, and plans of it."""
