"""Scorers: how each benchmark reads files and answers, and its numbers."""
