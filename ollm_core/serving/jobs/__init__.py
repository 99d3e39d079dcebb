"""Batch jobs: files of rows, answered to the end whatever happens between."""
