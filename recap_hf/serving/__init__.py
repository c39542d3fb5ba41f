"""`recap serve`: captions, tags and search over HTTP. The model runs in a process of its own."""
