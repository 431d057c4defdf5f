"""One function for each verb of the command line, and the planning before it computes."""
