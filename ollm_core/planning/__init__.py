"""Plans: what a run would hold and how long it would take, without running it."""
