"""LVM-Med: images of a batch told apart by matching the graphs of their two views."""
