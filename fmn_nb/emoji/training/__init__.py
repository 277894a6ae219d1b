"""The recipe that makes the emoji models: networks, the training loop, stages, the model card."""
