"""Serving: requests of many users and jobs over one model, a weight pass at a time; no network."""
