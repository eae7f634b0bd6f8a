"""CHAIR."""
