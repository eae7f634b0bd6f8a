"""Methods that change hidden states."""
