"""Exports of a hospital's archive (DICOM) → NIfTI scans and labels without identity, which ``prepare`` takes."""
