"""Every kind of bad file is refused with its reason, and every good container reads alike."""

import errno
import gzip
import os
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK

from nnssl_plugin.io import refusals, scans
from nnssl_plugin.io.itk_files import file_parts
from nnssl_plugin.io.refusals import RejectedScan, UnavailableScan
from nnssl_plugin.io.scans import load_scan, read_volume, stored_bytes


def refusal(path):
    with pytest.raises(RejectedScan) as caught:
        load_scan(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def patched(path, *, offset, content):
    """Overwrite bytes of the uncompressed stream of a .nii.gz file."""
    stream = bytearray(gzip.decompress(path.read_bytes()))
    stream[offset : offset + len(content)] = content
    path.write_bytes(gzip.compress(bytes(stream)))
    return path


PIXDIM, DIM, SIZEOF_HDR = 76, 40, 0  # offsets of nifti1.h


@pytest.mark.parametrize("kept", [10, 400, -9, -1])
def test_truncated_gzip_is_refused_even_where_only_the_checksum_is_cut(save, kept):
    path = save("a.nii.gz")
    path.write_bytes(path.read_bytes()[:kept])
    assert "truncated" in refusal(path)


def test_damaged_gzip_checksum_is_refused(save):
    path = save("a.nii.gz")
    content = bytearray(path.read_bytes())
    content[-8] ^= 0xFF
    path.write_bytes(bytes(content))
    assert "CRC" in refusal(path)


def test_truncated_voxels_are_refused(save):
    for name in ("a.nii", "b.nii.gz"):
        path = save(name)
        stream = path.read_bytes() if name.endswith(".nii") else gzip.decompress(path.read_bytes())
        path.write_bytes(stream[:-3] if name.endswith(".nii") else gzip.compress(stream[:-3]))
        assert "truncated: the header promises" in refusal(path)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_nrrd_and_metaimage_are_refused(source, phantom, ending, compressed):
    path = source / f"a{ending}"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(phantom()), str(path), compressed)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
def test_empty_and_garbage_files_are_refused(source, name):
    (source / name).write_bytes(b"")
    assert refusal(source / name) == "empty file (0 bytes)"
    (source / name).write_bytes(b"\x89PNG no scan at all" * 40)
    assert "unreadable" in refusal(source / name)


def test_missing_file_is_refused(source):
    assert "FileNotFoundError" in refusal(source / "gone.nii.gz")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((8, 8, 8, 3), "4D image"), ((8, 8, 8, 1), "4D image"), ((8, 8), "2D image"), ((8, 8, 1), "single slice")],
)
def test_other_than_three_dimensions_are_refused(save, shape, reason):
    assert reason in refusal(save("a.nii.gz", np.arange(np.prod(shape), dtype=np.float32).reshape(shape)))


def test_2d_4d_and_vector_images_of_itk_are_refused(source):
    array = np.arange(5 * 6 * 7 * 3, dtype=np.float32).reshape(5, 6, 7, 3)
    images = {
        "2D": SimpleITK.GetImageFromArray(array[0, ..., 0]),
        "4D": SimpleITK.GetImageFromArray(array, isVector=False),
        "3 values per voxel": SimpleITK.GetImageFromArray(array, isVector=True),
    }
    for reason, image in images.items():
        SimpleITK.WriteImage(image, str(source / "a.nrrd"))
        assert reason in refusal(source / "a.nrrd")


def test_colour_and_complex_voxels_are_refused(save):
    colour = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "colour or complex" in refusal(save("a.nii.gz", colour))
    assert "colour or complex" in refusal(save("b.nii.gz", np.ones((4, 4, 4), dtype=np.complex64)))


@pytest.mark.parametrize("value", [0.0, -7.5])
def test_constant_image_is_refused(save, value):
    assert f"constant image: every voxel is {value:g}" in refusal(save("a.nii.gz", np.full((4, 5, 6), value)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_and_counted(save, phantom, value):
    array = phantom()
    array[2, 3, 4:6] = value
    assert "2 voxels are NaN or infinite" in refusal(save("a.nii.gz", array))


@pytest.mark.parametrize("size", [0.0, -1.0, np.nan])
def test_spacing_of_zero_or_less_is_refused_before_nibabel_mends_it(save, size):
    path = patched(save("a.nii.gz"), offset=PIXDIM + 4 * 2, content=struct.pack("<f", size))
    assert "spacing of zero or less" in refusal(path)


@pytest.mark.parametrize("size", ["0", "-1"])
def test_spacing_of_zero_or_less_is_refused_in_metaimage(source, phantom, size):
    path = source / "a.mha"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(phantom()), str(path))
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 1 1 1", f"ElementSpacing = 1 {size} 1".encode()))
    assert "spacing of zero or less" in refusal(path)


def test_unreadable_headers_are_refused(save):
    assert "unreadable header" in refusal(patched(save("a.nii.gz"), offset=SIZEOF_HDR, content=b"\0\0\0\7"))
    assert "unreadable header" in refusal(patched(save("b.nii.gz"), offset=DIM + 2, content=struct.pack("<h", -5)))
    huge = struct.pack("<3h", 32767, 32767, 32767)
    assert "truncated" in refusal(patched(save("c.nii.gz"), offset=DIM + 2, content=huge))


def test_singular_sheared_and_contradicting_affines_are_refused(save):
    singular = np.diag([1.0, 1.0, 1.0, 1.0])
    singular[:3, 1] = singular[:3, 0]
    sheared = np.eye(4)
    sheared[1, 2] = 0.2
    assert "singular" in refusal(_with_sform(save("a.nii.gz"), singular))
    assert "singular" in refusal(_with_sform(save("b.nii.gz"), np.diag([1.0, 0.0, 1.0, 1.0])))
    assert "sheared" in refusal(_with_sform(save("c.nii.gz"), sheared))
    assert "contradicting header" in refusal(_with_sform(save("d.nii.gz"), np.diag([1.0, 2.0, 1.0, 1.0])))


def test_shear_is_refused_in_nrrd(source, phantom):
    path = source / "a.nrrd"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(phantom()), str(path))
    path.write_bytes(path.read_bytes().replace(b"(1,0,0)", b"(1,1,0)", 1))
    assert "shear" in refusal(path)


def test_oblique_affine_is_accepted(save):
    angle = np.deg2rad(20)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    assert load_scan(save("a.nii.gz", affine=affine)).spacing == pytest.approx((1, 1, 1), abs=1e-6)


def test_header_without_sform_and_qform_is_accepted_as_nibabel_reads_it(save):
    path = save("a.nii.gz")
    image = nibabel.load(path)
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    image.header.set_zooms((1.0, 2.0, 3.0))
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype=np.float32), None, image.header), path)
    scan = load_scan(path)
    assert scan.spacing == pytest.approx((1, 2, 3))
    np.testing.assert_array_equal(scan.image.affine, nibabel.load(path).affine)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_containers_give_the_same_voxels_geometry_and_hash(source, dtype):
    array = np.random.default_rng(0).integers(0, 200, size=(5, 6, 7)).astype(dtype)
    affine = np.array([[0, 0, 2.0, 5], [-1.5, 0, 0, 6], [0, 3.0, 0, 7], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(array, affine), source / "a.nii")
    image = SimpleITK.ReadImage(str(source / "a.nii"))
    for name in ("a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd"):
        SimpleITK.WriteImage(image, str(source / name))
    scans = [load_scan(source / name) for name in ("a.nii", "a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd")]
    for scan in scans:
        np.testing.assert_array_equal(scan.array, array.astype(np.float32))
        np.testing.assert_allclose(scan.image.affine, affine, atol=1e-5)
        assert scan.image.get_data_dtype() == dtype
        assert scan.orientation == "PSR"
    assert len({scan.voxels_sha256() for scan in scans}) == 1


def test_nifti2_and_big_endian_and_scaled_voxels_are_read(source, phantom):
    array = phantom()
    nibabel.save(nibabel.Nifti2Image(array, np.eye(4)), source / "two.nii.gz")
    big = nibabel.Nifti1Image(array, np.eye(4), nibabel.Nifti1Header(endianness=">"))
    nibabel.save(big, source / "big.nii.gz")
    scaled = nibabel.Nifti1Image(array * 1e4, np.eye(4))
    scaled.set_data_dtype(np.int16)
    nibabel.save(scaled, source / "scaled.nii.gz")
    np.testing.assert_array_equal(load_scan(source / "two.nii.gz").array, array)
    np.testing.assert_array_equal(load_scan(source / "big.nii.gz").array, array)
    np.testing.assert_allclose(load_scan(source / "scaled.nii.gz").array, array * 1e4, atol=20)


def test_detached_headers_name_their_data_file(source, phantom):
    for name in ("a.mhd", "b.nhdr"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(phantom()), str(source / name))
        header, data = file_parts(source / name)
        assert header == source / name
        assert data.is_file() and data != header
    data.unlink()
    assert "unreadable" in refusal(source / "b.nhdr")


def test_stored_bytes_are_the_same_twice_and_read_back(save, tmp_path):
    scan = load_scan(save("a.nii"))
    assert stored_bytes(scan.image) == stored_bytes(load_scan(save("a.nii")).image)
    (tmp_path / "b.nii.gz").write_bytes(stored_bytes(scan.image))
    np.testing.assert_array_equal(nibabel.load(tmp_path / "b.nii.gz").get_fdata(), scan.array)


def _with_sform(path, affine):
    """Store an sform that nibabel would not write, with a spacing of 1 mm."""
    patched(path, offset=252, content=struct.pack("<2h", 0, 1))
    return patched(path, offset=280, content=np.asarray(affine[:3], dtype="<f4").tobytes())


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize(("unit", "size"), [("micron", 1000.0), ("meter", 0.001), ("mm", 1.0), ("unknown", 1.0)])
def test_the_unit_of_a_nifti_header_is_read(source, phantom, kind, unit, size):
    affine = np.array([[0, -size, 0, 30 * size], [2 * size, 0, 0, -20 * size], [0, 0, 3 * size, 0], [0, 0, 0, 1]])
    image = kind((phantom() * 10).astype(np.int16), affine)
    image.header.set_xyzt_units(unit)
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, source / "a.nii.gz")
    scan = load_scan(source / "a.nii.gz")
    expected = np.array([[0, -1, 0, 30], [2, 0, 0, -20], [0, 0, 3, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(scan.image.affine, expected, atol=1e-5)
    np.testing.assert_allclose(scan.spacing, (2, 1, 3), rtol=1e-6)
    assert scan.in_mm == (unit in ("mm", "unknown"))
    array, affine = read_volume(source / "a.nii.gz")
    np.testing.assert_allclose(affine, expected, atol=1e-5)
    np.testing.assert_array_equal(array, scan.array)
    (source / "b.nii.gz").write_bytes(stored_bytes(scan.image))
    again = load_scan(source / "b.nii.gz")
    np.testing.assert_allclose(again.image.affine, expected, atol=1e-5)
    np.testing.assert_allclose(again.array, scan.array, atol=0.01)


def test_a_unit_that_cannot_be_meant_is_refused(source, phantom):
    image = nibabel.Nifti1Image(phantom(), np.eye(4))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, source / "a.nii.gz")
    assert "unit" in refusal(source / "a.nii.gz")


@pytest.mark.parametrize(
    ("name", "before", "stated"),
    [
        ("a.mha", b"ElementDataFile", b"DistanceUnits = UM\n"),
        ("a.nrrd", b"encoding:", b'space units: "um" "um" "um"\n'),
    ],
)
def test_units_of_nrrd_and_metaimage_are_read(source, phantom, name, before, stated):
    image = SimpleITK.GetImageFromArray(phantom())
    image.SetSpacing((1000, 2000, 3000))
    image.SetOrigin((5000, 0, 0))
    SimpleITK.WriteImage(image, str(source / name))
    content = (source / name).read_bytes()
    (source / name).write_bytes(content.replace(before, stated + before, 1))
    scan = load_scan(source / name)
    np.testing.assert_allclose(scan.image.affine, np.array([[-1, 0, 0, -5], [0, -2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]))
    other = stated.replace(b"um", b"furlong").replace(b"UM", b"furlong")
    (source / name).write_bytes(content.replace(before, other + before, 1))
    assert "unit of length furlong" in refusal(source / name)


def test_what_is_no_regular_file_is_not_opened(source):
    os.mkfifo(source / "a.nii.gz")
    os.mkfifo(source / "b.mhd")
    (source / "c.nrrd").mkdir()
    (source / "d.nii").symlink_to("/dev/zero")
    for name in ("a.nii.gz", "b.mhd", "c.nrrd", "d.nii"):
        assert "no regular file" in refusal(source / name)
        with pytest.raises(RejectedScan, match="no regular file"):
            read_volume(source / name)


@pytest.mark.parametrize(
    ("name", "replaced", "stated"),
    [
        ("a.mhd", b"ElementDataFile = a.raw", b"ElementDataFile = %s"),
        ("a.mhd", b"ElementDataFile = a.raw", b"elementdatafile = a.raw\n ElementDataFile: %s"),
        ("a.mhd", b"ElementDataFile = a.raw", b"ElementDataFile = LIST\n%s"),
        ("a.nhdr", b"data file: a.raw", b"data file: %s"),
        ("a.nhdr", b"data file: a.raw", b"data file: LIST\n%s"),
        ("a.nhdr", b"data file: a.raw", b"datafile: a.raw\nData File: %s"),
    ],
)
def test_a_header_may_not_name_data_outside_of_its_folder(source, tmp_path, phantom, name, replaced, stated):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(phantom()), str(source / name))
    path, content = source / name, (source / name).read_bytes()
    assert replaced in content
    (source / "a.raw").rename(tmp_path / "secret.raw")
    for target in (str(tmp_path / "secret.raw"), "../secret.raw", "linked.raw"):
        (source / "linked.raw").unlink(missing_ok=True)
        (source / "linked.raw").symlink_to(tmp_path / "secret.raw")
        path.write_bytes(content.replace(replaced, stated % target.encode()))
        assert "data file" in refusal(path)
        assert file_parts(path) == [path]


def test_an_attached_header_may_not_name_another_file(source, tmp_path, phantom):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(phantom()), str(source / "a.mha"))
    content = (source / "a.mha").read_bytes()
    (tmp_path / "secret.raw").write_bytes(content[-20 * 18 * 16 * 4 :])
    stated = f"ElementDataFile = {tmp_path / 'secret.raw'}".encode()
    (source / "a.mha").write_bytes(content.replace(b"ElementDataFile = LOCAL", stated))
    assert "outside its own folder" in refusal(source / "a.mha")


def test_a_linked_header_finds_the_data_beside_the_original(source, tmp_path, phantom):
    store = tmp_path / "store"
    store.mkdir()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(phantom()), str(store / "a.mhd"))
    for name in ("a.mhd", "a.raw"):
        (source / name).symlink_to(store / name)
    np.testing.assert_array_equal(load_scan(source / "a.mhd").array, phantom().T)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
def test_memory_is_judged_by_the_header(source, phantom, monkeypatch, name):
    image = SimpleITK.GetImageFromArray(phantom())
    SimpleITK.WriteImage(image, str(source / name), True)
    needed = phantom().size * (4 + refusals.BYTES_PER_VOXEL)
    monkeypatch.setattr(refusals, "available_memory", lambda: needed)
    load_scan(source / name)
    monkeypatch.setattr(refusals, "available_memory", lambda: needed - 1)
    for read in (load_scan, read_volume):
        with pytest.raises(UnavailableScan, match="too large for the memory"):
            read(source / name)


def test_a_bomb_is_refused_before_it_is_expanded(source):
    header = nibabel.Nifti1Header()
    header.set_data_shape((2000, 2000, 2000))
    header.set_data_dtype(np.float64)
    (source / "a.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(1 << 20)))
    assert "truncated: the header promises 64000000352 bytes" in refusal(source / "a.nii.gz")


def test_endless_bytes_after_the_voxels_are_refused(save, monkeypatch):
    path = save("a.nii.gz")
    stream = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(stream + bytes(100)))
    load_scan(path)
    monkeypatch.setattr(scans, "MOST_TRAILING_BYTES", 1000)
    path.write_bytes(gzip.compress(stream + bytes(len(stream) + (2 << 20)), 1))
    assert "after the" in refusal(path)


@pytest.mark.parametrize("code", [7, 1, 0, 999])
def test_unknown_datatypes_are_refused(save, code):
    reason = refusal(patched(save("a.nii.gz"), offset=70, content=struct.pack("<h", code)))
    assert "unknown datatype" in reason or "one number per voxel is needed" in reason


def test_causes_outside_of_the_file_are_told_from_its_own(save, monkeypatch):
    path = save("a.nii.gz")

    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(scans, "_read_nifti", failing)
        with pytest.raises(UnavailableScan):
            load_scan(path)
    path.write_bytes(b"damaged")
    with pytest.raises(RejectedScan) as caught:
        load_scan(path)
    assert not isinstance(caught.value, UnavailableScan)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_written_headers_hold_geometry_alone(source, phantom, kind, endianness):
    affine = np.array([[0, -1.0, 0, 30], [2.0, 0, 0, -20], [0, 0, 3.0, 0], [0, 0, 0, 1]])
    image = kind(phantom(), affine, kind.header_class(endianness=endianness))
    image.set_qform(affine, code=3)
    image.set_sform(affine, code=2)
    texts = {"descrip": b"Doe^Jane 1970", "aux_file": b"/home/doe", "intent_name": b"Doe"}
    texts |= {"db_name": b"Doe Jane"} if kind is nibabel.Nifti1Image else {}
    for name, text in texts.items():
        image.header[name] = text
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    stream = gzip.decompress(stored_bytes(image))
    assert b"Doe" not in stream
    again = kind.from_bytes(stream)
    np.testing.assert_array_equal(again.get_fdata(), image.get_fdata())
    np.testing.assert_array_equal(again.affine, image.affine)
    for name in ("get_qform", "get_sform"):
        for one, other in zip(getattr(again, name)(coded=True), getattr(image, name)(coded=True), strict=True):
            np.testing.assert_array_equal(one, other)
