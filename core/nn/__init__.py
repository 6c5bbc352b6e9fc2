"""Networks of the diffusion literature over 1, 2 or 3 axes: blocks, UNet, autoencoder."""
