"""Methods that change attention weights."""
