"""The families of networks that this package knows, one file each: its reader, and its ``FAMILIES``."""
