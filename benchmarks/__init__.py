"""Speed, fidelity and comparison of agents, measured and stored; not part of the installed package."""
