"""Every contract between the parts, by subject: abstract base classes, protocols, data."""
