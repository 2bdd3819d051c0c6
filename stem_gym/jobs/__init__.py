"""What the command line does, as functions: benchmark, train, deploy, demo. Each can be called from Python too."""
