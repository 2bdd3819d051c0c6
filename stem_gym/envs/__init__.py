"""The loop that joins a task, an instrument and a budget, and its Gymnasium faces."""
