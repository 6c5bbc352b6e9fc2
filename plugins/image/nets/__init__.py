"""Networks of the image plugin."""
