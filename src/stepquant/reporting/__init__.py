"""Image files and plots."""
