"""BrainMVP (Rui et al.): learning across the modalities of a case, and a template of each modality."""
