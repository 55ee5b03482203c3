"""Models behind an OpenAI-compatible server: measured on the same panels, by text instead of token ids."""
