"""Contracts that every other floor speaks: instructions, readings, instruments, tasks, streams, settings."""
