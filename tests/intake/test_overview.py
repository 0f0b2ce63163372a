"""Ranges, outliers and counted reasons of a prepared dataset."""

import numpy as np

from nnssl_plugin.intake.ledger import Origin, Rejection, read_rows, write_rows
from nnssl_plugin.intake.overview import count_reasons, describe_cases, far_shares


def origin(case, share="0.5", shape="10x20x30", spacing="1x1x3"):
    return Origin(case, f"/scans/{case}", "", shape, spacing, "RAS", "linked", "", "", share)


def test_ranges_of_size_spacing_and_share():
    lines = describe_cases([origin("a", "0.4"), origin("b", "0.5", "12x20x40", "1x1x2.5"), origin("c", "0.45")])
    assert lines == ["size     10-12 x 20 x 30-40 voxels", "spacing  1 x 1 x 2.5-3 mm",
                     "mask     40% to 50% of the image, median 45%"]  # fmt: skip
    assert describe_cases([]) == []
    assert describe_cases([origin("a", "", "10x20", "")]) == ["size     10 x 20 voxels"]


def test_shares_far_from_the_others_are_named_the_farthest_first():
    shares = {f"c{i}": share for i, share in enumerate(np.random.default_rng(0).normal(0.5, 0.03, 50))}
    assert far_shares(shares) == []
    assert far_shares({**shares, "half": 0.25, "tiny": 0.01}) == ["tiny", "half"]
    assert far_shares({"a": 0.01}) == ["a"] and far_shares({}) == []
    line = describe_cases([origin("bad", "0.0100"), *(origin(f"c{i}") for i in range(4))])[-1]
    assert line.startswith("look at bad (1.0%)")


def test_reasons_are_counted_without_what_is_particular_to_a_file():
    reasons = ["set aside: named as a segmentation (mask in a)", "set aside: named as a segmentation (seg in b)",
               "7 voxels are NaN or infinite", "9 voxels are NaN or infinite", "4D image (3, 4, 5, 6): a 3D volume …",
               "set aside: named as a segmentation (seg in c)"]  # fmt: skip
    rows = [Rejection(str(number), reason, "") for number, reason in enumerate(reasons)]
    assert count_reasons(rows) == [
        (3, "named as a segmentation", rows[0]),
        (2, "voxels are NaN or infinite", rows[2]),
        (1, "4D image", rows[4]),
    ]


def test_tables_of_earlier_versions_have_no_shares(tmp_path):
    path = tmp_path / "provenance.csv"
    write_rows(path, Origin, [origin("a", "0.5")])
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.rsplit(",", 3)[0] for line in lines))
    assert read_rows(path, Origin) == [origin("a", "")]
