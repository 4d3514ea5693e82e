"""The stages of a run as Ray work."""
