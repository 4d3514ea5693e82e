"""The stages of a run, each of which goes on where it was stopped."""
