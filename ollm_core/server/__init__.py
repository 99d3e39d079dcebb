"""HTTP in, requests to a session, events out. Needs the extra `serve`."""
