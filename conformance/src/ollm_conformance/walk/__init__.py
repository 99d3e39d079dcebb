"""Random walks over a whole model: any order of what a user may do, against transformers."""
