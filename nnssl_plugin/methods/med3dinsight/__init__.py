"""Med3DInsight: volumes aligned with frozen embeddings of one of their slices and of its description."""
