"""The training step and what stands around it."""
