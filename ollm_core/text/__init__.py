"""Text and token ids: tokenizers, chat templates and what a checkpoint says of generating."""
