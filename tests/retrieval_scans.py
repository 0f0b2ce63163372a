"""A folder of small scans of two kinds, for tests of retrieval."""

from pathlib import Path

import nibabel
import numpy as np


def write_scans(folder: Path, number: int = 6, *, shape=(20, 22, 18), channels: int = 1, first: int = 0) -> Path:
    """Write ``case_00_0000.nii.gz`` …: even cases hold a bright ball, odd ones stripes, and ``masks`` beside the folder
    two lesions each; ``cases.csv`` says kind and subject, two cases each."""
    folder.mkdir(parents=True, exist_ok=True)
    masks = folder.parent / "masks"
    masks.mkdir(exist_ok=True)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
    lines = ["case,subject,kind"]
    for case in range(first, first + number):
        rng = np.random.default_rng(case)
        ball = np.linalg.norm(grid, axis=0) < 0.7
        pattern = ball if case % 2 == 0 else ball & (np.sin(9 * grid[0]) > 0)
        for channel in range(channels):
            image = 100 * pattern * (1 + channel) + rng.uniform(0, 10, shape)
            file = folder / f"case_{case:02d}_{channel:04d}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0])), file)
        mask = np.zeros(shape, dtype=np.uint8)
        mask[3:6, 4:7, 2:4], mask[12:18, 10:15, 10:16] = 1, 2
        nibabel.save(nibabel.Nifti1Image(mask, np.diag([1.0, 1.0, 2.0, 1.0])), masks / f"case_{case:02d}.nii.gz")
        lines.append(f"case_{case:02d},subject_{case // 2},{'stripes' if case % 2 else 'ball'}")
    (folder.parent / "cases.csv").write_text("\n".join(lines) + "\n")
    return folder
