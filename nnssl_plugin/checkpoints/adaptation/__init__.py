"""Weights of one network in another: rules, coverage, reports, and the plan for the target."""
