"""What DCP can serve, and the error for what it cannot."""
