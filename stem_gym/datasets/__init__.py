"""Measured and computed data by name, with checksum and licence."""
