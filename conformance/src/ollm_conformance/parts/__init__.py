"""The contracts of other parts, as test classes: subclass one and say how to make the part."""
