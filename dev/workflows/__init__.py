"""Writes the example workflows of the template browser."""
