"""Re-exports only: nnU-Net finds the trainers here (nnUNet_extTrainer) and the package defines them."""
