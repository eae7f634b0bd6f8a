"""Methods that change hidden states: their base class and the hooks that run them."""
