"""An HTTP server with OpenAI's interface, over an engine: the extra `[serve]`."""
