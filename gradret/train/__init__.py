"""Training an encoder on graded lists."""
