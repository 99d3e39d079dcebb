"""Memory: budgets, accounts, and what the machine has."""
