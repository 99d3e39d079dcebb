"""The user's files: paths, scratch files, and JSON that anybody may have written."""
