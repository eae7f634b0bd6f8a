"""Calibration: finding a method's parameters for one model, and the files that keep them."""
