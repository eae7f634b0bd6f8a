"""Methods that run a program around generate."""
