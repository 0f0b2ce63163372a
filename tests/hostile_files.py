"""Files that are damaged, or made to do harm, for tests that nothing comes of them but a line in a table."""

import gzip
import os
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

FIELDS = {
    "sizeof_hdr": (0, "<i"),
    "dim": (40, "<8h"),
    "datatype": (70, "<h"),
    "bitpix": (72, "<h"),
    "pixdim": (76, "<8f"),
}
"""Where numbers of a NIfTI-1 header stand, and how."""
METAIMAGE = "ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementType = {type}\nElementSpacing = 1 1 1\n"
NRRD = "NRRD0004\ntype: {type}\ndimension: 3\nsizes: {size}\nencoding: {encoding}\nspacings: 1 1 1\n"


def write_hostile_scans(folder: Path, count: int, *, secret: Path) -> list[Path]:
    """Write ``count`` files that no dataset may take.

    Args:
        folder: for the files, empty.
        count: how many; some 130 are of every kind, the rest are NIfTI files with random damage.
        secret: a file elsewhere, at which headers point.

    Returns:
        the paths of all of them.
    """
    rng = np.random.default_rng(0)
    good = nibabel.Nifti1Image(rng.uniform(1, 9, (12, 11, 10)).astype(np.float32), np.eye(4)).to_bytes()
    made = {**_headers(good), **_streams(good), **_detached(secret), **_other_bytes(rng)}
    paths = []
    for name, content in list(made.items())[:count]:
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    paths += _special(folder, secret)[: max(0, count - len(paths))]
    while len(paths) < count:
        damaged = bytearray(good)
        place = int(rng.integers(0, 40))
        damaged[place * 2] ^= 1 + int(rng.integers(255))
        cut = int(rng.integers(1, len(damaged)))
        paths.append(folder / f"random_{len(paths):03d}.nii")
        paths[-1].write_bytes(bytes(damaged[:cut]))
    return paths


def _changed(good: bytes, field: str, *values) -> bytes:
    place, form = FIELDS[field]
    content = bytearray(good)
    struct.pack_into(form, content, place, *values)
    return bytes(content)


def _headers(good: bytes) -> dict[str, bytes]:
    huge = (3, 32767, 32767, 32767, 1, 1, 1, 1)
    made = {
        "bomb_by_header.nii": _changed(good, "dim", *huge),
        "bomb_by_header.nii.gz": gzip.compress(_changed(good, "dim", *huge)),
        "seven_dimensions.nii": _changed(good, "dim", 7, 9, 9, 9, 9, 9, 9, 9),
        "no_dimensions.nii": _changed(good, "dim", 0, 0, 0, 0, 0, 0, 0, 0),
        "minus.nii": _changed(good, "dim", 3, -12, 11, 10, 1, 1, 1, 1),
        "minus_dimensions.nii": _changed(good, "dim", -3, 12, 11, 10, 1, 1, 1, 1),
        "hundred_dimensions.nii": _changed(good, "dim", 100, 12, 11, 10, 1, 1, 1, 1),
        "empty_axis.nii": _changed(good, "dim", 3, 12, 0, 10, 1, 1, 1, 1),
        "one_slice.nii": _changed(good, "dim", 3, 12, 110, 1, 1, 1, 1, 1),
        "nan_spacing.nii": _changed(good, "pixdim", 1, np.nan, 1, 1, 0, 0, 0, 0),
        "infinite_spacing.nii": _changed(good, "pixdim", 1, np.inf, 1, 1, 0, 0, 0, 0),
        "zero_spacing.nii": _changed(good, "pixdim", 1, 0, 1, 1, 0, 0, 0, 0),
        "no_header.nii": _changed(good, "sizeof_hdr", 17),
    }
    for code in (0, 1, 3, 32, 128, 1280, 1536, 1792, 2048, 2304, 9999, -1):
        made[f"datatype_{code}.nii"] = _changed(good, "datatype", code)
        made[f"datatype_{code}.nii.gz"] = gzip.compress(made[f"datatype_{code}.nii"])
    values = np.frombuffer(good[352:], dtype=np.float32).copy()
    values[5] = np.nan
    made["nan.nii"] = good[:352] + values.tobytes()
    made["constant.nii"] = good[:352] + np.ones_like(values).tobytes()
    return made


def _streams(good: bytes) -> dict[str, bytes]:
    packed = gzip.compress(good)
    small = gzip.compress(_changed(good, "dim", 3, 4, 4, 4, 1, 1, 1, 1) + bytes(1 << 28), 9)
    made = {f"cut_{part:03d}.nii.gz": packed[: len(packed) * part // 100] for part in range(1, 100, 9)}
    made |= {f"cut_{part:03d}.nii": good[: len(good) * part // 100] for part in range(1, 100, 9)}
    made |= {f"flipped_{k:02d}.nii.gz": _flipped(packed, len(packed) * k // 12) for k in range(1, 12)}
    return made | {
        "empty.nii.gz": b"",
        "empty.nrrd": b"",
        "empty.mha": b"",
        "not_packed.nii.gz": good,
        "bomb.nii.gz": small,
        "header_only.nii": good[:352],
        "two_bytes.nii.gz": b"\x1f\x8b",
        "zlib.nii.gz": zlib.compress(good),
    }


def _flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 0xFF
    return bytes(changed)


def _detached(secret: Path) -> dict[str, bytes]:
    outside = {
        "absolute": secret,
        "above": f"../{secret.parent.name}/{secret.name}",
        "password": "/etc/passwd",
        "device": "/dev/zero",
        "nowhere": "nowhere.raw",
        "list": "LIST",
        "pattern": "%03d.raw 1 9 1",
        "empty": "",
    }
    meta = METAIMAGE.format(size="10 10 10", type="MET_UCHAR")
    nrrd = NRRD.format(size="10 10 10", type="uchar", encoding="raw")
    made = {f"{name}.mhd": f"{meta}ElementDataFile = {path}\n".encode() for name, path in outside.items()}
    made |= {f"{name}.nhdr": f"{nrrd}data file: {path}\n\n".encode() for name, path in outside.items()}
    return made | {
        "detached.mha": f"{meta}ElementDataFile = {secret}\n".encode(),
        "detached.nrrd": f"{nrrd}data file: {secret}\n\n".encode(),
        "twice.nhdr": f"{nrrd}data file: {secret}\ndatafile: {secret}\n\n".encode(),
    }


def _other_bytes(rng: np.random.Generator) -> dict[str, bytes]:
    meta, nrrd = METAIMAGE, NRRD
    local, many = b"ElementDataFile = LOCAL\n", "99999 99999 99999"
    made = {
        "bomb.mha": meta.format(size=many, type="MET_DOUBLE").encode() + local + bytes(64),
        "short.mha": meta.format(size="10 10 10", type="MET_FLOAT").encode() + local + bytes(64),
        "type.mha": meta.format(size="4 4 4", type="MET_NOTHING").encode() + local + bytes(64),
        "colour.mha": (meta + "ElementNumberOfChannels = 3\n").format(size="4 4 4", type="MET_UCHAR").encode()
        + local
        + bytes(range(192)),
        "bomb.nrrd": nrrd.format(size=many, type="double", encoding="raw").encode() + b"\n" + bytes(64),
        "short.nrrd": nrrd.format(size="10 10 10", type="float", encoding="raw").encode() + b"\n" + bytes(64),
        "type.nrrd": nrrd.format(size="4 4 4", type="nothing", encoding="raw").encode() + b"\n" + bytes(64),
        "packed.nrrd": nrrd.format(size="4 4 4", type="uchar", encoding="gzip").encode() + b"\n" + bytes(64),
        "endless_header.nrrd": b"NRRD0004\n" + b"# nothing\n" * 20000,
        "minus.nrrd": nrrd.format(size="-4 4 4", type="uchar", encoding="raw").encode() + b"\n" + bytes(64),
    }
    for ending in ("nii", "nii.gz", "nrrd", "mha", "mhd", "nhdr"):
        made[f"noise.{ending}"] = rng.bytes(3000)
        made[f"text.{ending}"] = b"Patient: unknown\n" * 40
    return made


def _special(folder: Path, secret: Path) -> list[Path]:
    """What is no regular file, and names that are hard to write."""
    paths = [folder / name for name in ("fifo.nii.gz", "zero.nii", "loop.nii", "dangling.nrrd", "secret.nii")]
    os.mkfifo(paths[0])
    for path, target in zip(paths[1:], ("/dev/zero", "loop.nii", "nowhere.nrrd", secret), strict=True):
        path.symlink_to(target)
    for name in (b"M\xfcller.nii.gz", b"line\nbreak.mha", b"x" * 248 + b".nii.gz", b"\xff\xfe.mhd", b"\x1b[2J.nrrd"):
        paths.append(folder / os.fsdecode(name))
        paths[-1].write_bytes(b"damaged")
    return paths


def write_hostile_pictures(folder: Path) -> list[Path]:
    """Write 2D images that no dataset may take, and return their paths."""
    whole = folder / "whole.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(whole)
    png = whole.read_bytes()
    Image.fromarray(pixels).save(folder / "whole.tif")
    tif = (folder / "whole.tif").read_bytes()
    for path in (whole, folder / "whole.tif"):
        path.unlink()
    size = struct.pack(">II", 60000, 60000)
    chunk = b"IHDR" + size + png[24:29]
    made = {
        "bomb.png": png[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:],
        "cut.png": png[: len(png) // 2],
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
        "gif.png": b"GIF89a" + bytes(40),
        "noise.jpg": np.random.default_rng(1).bytes(500),
        "empty.bmp": b"",
        "huge.bmp": b"BM" + bytes(16) + struct.pack("<Iii", 40, 2**30, 2**30) + bytes(60),
    }
    made |= {f"cut_{part}.tif": tif[: len(tif) * part // 10] for part in range(1, 10)}
    made |= {f"flipped_{k}.tif": _flipped(tif, 4 + k) for k in range(3)}
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in made]
