"""Pictures on disk: grids of images, and plots."""
