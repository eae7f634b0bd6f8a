"""Methods that strengthen or silence attention heads."""
