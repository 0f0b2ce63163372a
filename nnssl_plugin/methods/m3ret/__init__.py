"""M3Ret: one encoder for X-ray, ultrasound, video and CT, by masked autoencoding or SimDINO."""
