"""M3Ret: one encoder for X-ray, ultrasound, video and CT, by masked autoencoding or SimDINO."""

CITATIONS = (
    "Liu, C., Jiang, Z., Fang, C., Guo, H., Zhou, Y.-J., Qu, J., Lu, L., Xu, M.: M3Ret: Unleashing Zero-shot "
    "Multimodal Medical Image Retrieval via Self-Supervision (M3Ret). 2025.",
)
"""Of both trainings."""
