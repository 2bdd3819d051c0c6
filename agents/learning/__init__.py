"""What the learning agents share: the network, the adapter to Stable-Baselines3, the training run."""
