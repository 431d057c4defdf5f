"""What every room needs: the package's exception, progress output, and files on disk."""
