"""All knowledge of one kind of data."""
