"""Architecture adapters, denoiser calls, module replacement, and float weights read from disk."""
