"""Training: what a recipe says, put together (`run`) and trained (`loop`), with averages, checkpoints, logs and exports."""
