"""MAE with aligned contrast: masked autoencoding of two overlapping crops, whose shared points must agree."""
