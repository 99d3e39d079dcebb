"""The transformers model without weights, inspected once: its layers and what is around."""
