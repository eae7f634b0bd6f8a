"""Methods that drop image tokens."""
