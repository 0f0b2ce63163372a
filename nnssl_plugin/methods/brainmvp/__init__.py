"""BrainMVP: masked reconstruction across modalities, and a learned template of each (Rui et al. 2024)."""
