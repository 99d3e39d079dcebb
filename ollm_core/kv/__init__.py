"""Keys, values and recurrent states of many sequences: on the device, in host memory or on disk."""
