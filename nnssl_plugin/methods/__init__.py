"""What is learned: one folder per paper."""
