"""Text data: reading, tokenizing, batching, chat templates."""
