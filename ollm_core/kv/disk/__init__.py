"""KV on disk: files, directories, and the prefix cache that outlives a process."""
