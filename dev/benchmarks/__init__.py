"""Measurements: each module is a program (`python dev.py bench NAME`) that prints a table and writes JSON."""
