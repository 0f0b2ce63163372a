"""Mathematics shared by the methods: torch in, torch out, no nnU-Net and no files."""
