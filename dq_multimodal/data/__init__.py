"""Rows in: datasets, files and columns, read with care whoever made them."""
