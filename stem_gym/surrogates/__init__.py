"""Networks with the signature of the physics they stand for, each with an uncertainty, a valid range and a model card."""
