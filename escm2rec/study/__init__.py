"""Studies against known truth."""
