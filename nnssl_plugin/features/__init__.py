"""Features of images, out of pretrained checkpoints."""
