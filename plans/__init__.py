"""Presets: plan fragments as JSON, one per method and backbone."""
