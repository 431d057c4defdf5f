"""One function per verb of the command line, and the checks and plans before it computes."""
