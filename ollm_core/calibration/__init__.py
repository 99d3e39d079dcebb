"""Calibration: measures how fast this machine is."""
