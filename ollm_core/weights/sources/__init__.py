"""Reading engines: how bytes of checkpoint files are brought into memory."""
