"""Imports GGUF files, and checks that nothing in the file is lost."""
