"""Plans: the memory and the time of a run, predicted without running it."""
