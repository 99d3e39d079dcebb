"""The parts of gpu.py: what is learned on a card, each by a process of its own."""
