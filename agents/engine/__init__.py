"""What every agent is run with: finding, saving, evaluating, checking."""
