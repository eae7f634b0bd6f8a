"""Methods that contrast two distributions."""
