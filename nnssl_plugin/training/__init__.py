"""nnU-Net trainers: pretraining and fine-tuning."""
