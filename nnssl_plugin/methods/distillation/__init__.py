"""Distillation: what a frozen network of any checkpoint sees in a volume, taught to the planned network."""
