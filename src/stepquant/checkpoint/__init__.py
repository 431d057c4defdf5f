"""The native checkpoint: a diffusers folder with packed weights, checked on every load."""
