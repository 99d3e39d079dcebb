"""Reading engines: read bytes of checkpoint files into memory."""
