"""Opening what a user names, what images are of, and drawing them."""
