"""Facts about nnU-Net's own files: plans and their edits, raw datasets, planes, folds, labels."""
