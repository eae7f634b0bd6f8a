"""AMBER."""
