"""M3Ret's masked autoencoding: a transformer sees a quarter of the patches of whole images, videos and volumes."""
