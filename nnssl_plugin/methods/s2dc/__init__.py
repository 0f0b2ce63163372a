"""S2DC: patches of two views matched one to one, softened where several patches show the same structure."""
