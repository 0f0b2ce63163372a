"""Files, scans and figures: reading strictly, writing so that an interruption never leaves half of one behind."""
