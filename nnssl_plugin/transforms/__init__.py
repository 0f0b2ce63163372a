"""What moves or hides voxels, made on the device: affine views and masks."""
