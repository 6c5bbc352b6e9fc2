"""Public checkpoints of video models."""
