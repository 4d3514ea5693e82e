"""Encoders and classifiers: where they are, and how they load."""
