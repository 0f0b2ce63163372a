"""The files of a checkpoint: written atomically, read without running code, and what they say of themselves."""
