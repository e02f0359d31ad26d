"""What is timed and measured; see README.md."""
