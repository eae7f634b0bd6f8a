"""Methods that cost as much as a real method and know nothing: what a gain has to beat."""
