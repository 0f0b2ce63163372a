"""A trained classifier asked about new images: one row per case, and where the model looked."""
