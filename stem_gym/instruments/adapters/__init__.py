"""One module per vendor: turns the minimal instruction set into its calls, and its counts into readings."""
