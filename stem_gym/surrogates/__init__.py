"""Networks with the signature of the physics they stand for, each with an uncertainty and a model card."""
