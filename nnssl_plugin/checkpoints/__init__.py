"""What a checkpoint holds, how it is read safely, and how it is adapted to a target."""
