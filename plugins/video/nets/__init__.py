"""Networks of the video plugin."""
