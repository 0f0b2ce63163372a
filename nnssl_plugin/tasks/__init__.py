"""What is done with weights: a folder per task."""
