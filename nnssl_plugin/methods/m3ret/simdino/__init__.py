"""M3Ret's SimDINO: views of an image agree, and the coding rate keeps images apart."""
