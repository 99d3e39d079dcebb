"""Plugins: hooks, what is installed, and what adapters declare."""
