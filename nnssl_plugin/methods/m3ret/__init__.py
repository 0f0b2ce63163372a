"""M3Ret: one encoder for X-ray, ultrasound, video and CT, by masked autoencoding or SimDINO."""

CITATION = (
    "Liu, C., Jiang, Z., Fang, C., Guo, H., Zhou, Y.-J., Qu, J., Lu, L., Xu, M.: M3Ret: Unleashing Zero-shot "
    "Multimodal Medical Image Retrieval via Self-Supervision ({objective}). 2025."
)
"""Of both trainings; each names its ``objective``."""
