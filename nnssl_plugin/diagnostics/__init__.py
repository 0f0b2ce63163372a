"""Measures of a representation while it is trained: collapse, and how well tokens tell structures apart."""
