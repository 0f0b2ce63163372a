"""nnU-Net's preprocessed cases as batches that depend on the step alone."""
