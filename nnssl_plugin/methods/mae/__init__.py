"""MAE: masked autoencoding (He et al. 2022) of volumes and images, for any planned network."""
