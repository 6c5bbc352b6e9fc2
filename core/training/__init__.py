"""Training: what a recipe says, put together (`run`) and trained (`loop`); averages, checkpoints, logs and exports."""
