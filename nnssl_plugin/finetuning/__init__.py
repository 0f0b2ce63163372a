"""Fine-tuning: its settings, its groups of parameters, and the weights that a plan names."""
