"""One file per vendor: each turns the minimal instruction set into that vendor's calls, and its counts into readings."""
