"""BrainMVP's fine-tuning: modalities replaced by their templates at random (appendix A)."""
