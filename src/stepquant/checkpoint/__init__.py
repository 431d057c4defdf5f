"""The native checkpoint: a diffusers folder with packed weights, verified on every load."""
