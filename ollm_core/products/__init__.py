"""Matrix products on processors that multiply half precision slowly, chosen by rows."""
