"""Memory: budgets, accounts of who holds what, and what the machine has."""
