"""Image classification on nnU-Net's plans, folds and files."""
