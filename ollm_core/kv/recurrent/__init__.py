"""Recurrent states of many sequences, in memory and on disk."""
