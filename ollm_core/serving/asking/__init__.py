"""Questions on documents: prompts that begin alike, decisions without decoding."""
