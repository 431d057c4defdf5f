"""What training by blocks and by trajectories share."""
