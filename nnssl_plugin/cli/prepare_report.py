"""What the verb ``prepare`` prints before, and about what it made."""

SHOWN = 5
"""Reasons, folders or cases that are printed; the tables hold them all."""


def print_preview(ahead):
    """What a run is about to read and write."""
    print(
        f"To look at: {ahead.cases} cases ({ahead.files} files, {_bytes(ahead.read)}, {ahead.voxels / 1e6:.3g} million "
        f"voxels); {ahead.known} are known."
    )
    if ahead.ranges:
        print(f"  by their headers: {ahead.ranges}")
    for count, reason in ahead.by_name:
        print(f"  {count} x to be set aside by their names: {reason}")
    if ahead.cases:
        minutes = f"{ahead.seconds / 60:.0f} minutes" if ahead.seconds > 90 else f"{ahead.seconds:.0f} seconds"
        print(f"  about {minutes}, and {_bytes(ahead.written)} on the disk, which has {_bytes(ahead.free)} left")


def print_series_ahead(rows):
    """Which series of an export are about to be converted, and why others are not."""
    from nnssl_plugin.intake.dicom.table import TAKEN, count_reasons

    taken = [row for row in rows if row["status"] == TAKEN]
    planes = sum(int(row["slices"]) for row in taken)
    print(f"To convert: {len(taken)} of {len(rows)} series ({planes} slices).")
    _print_some(count_reasons([row for row in rows if row["status"] != TAKEN]), "{}")


def print_series(converted):
    """What became of the series of an export."""
    from nnssl_plugin.intake.dicom.table import LEFT_OUT, REFUSED, TAKEN, count_reasons

    counts = ", ".join(f"{len(converted.with_status(status))} {status}" for status in (TAKEN, LEFT_OUT, REFUSED))
    print(f"Series: {counts}; why: {converted.places.table}")
    _print_some(count_reasons([*converted.with_status(REFUSED), *converted.with_status(LEFT_OUT)]), "{}")
    _print_some(converted.told, "{}")
    _print_some(converted.unreadable, "unreadable: {}")


def print_videos(converted):
    """What became of the videos of a folder."""
    print(f"Videos: {len(converted.converted)} read, {len(converted.refused)} refused; frames: {converted.folder}")
    _print_some(converted.refused, "refused: {}")


def print_summary(summary):
    """The cases of a dataset, and the files that are not in it."""
    from nnssl_plugin.intake.unlabelled import made_grey

    print(f"{summary.folder}: {len(summary.added)} cases added, {summary.known} known, {summary.ignored} other files.")
    grey = made_grey(summary)
    if grey:
        print(f"  {grey} images had colour and were made grey; --modality RGB (another dataset) keeps it")
    if summary.dicom:
        print(f"  {summary.dicom} of the other files are DICOM; --series RULE takes these instead (another dataset)")
    if summary.excluded:
        print(f"  {summary.excluded} scans are left out by --include and --exclude")
    if summary.unnamed:
        print(f"  {summary.unnamed} scans belong to no modality by --modalities")
    _print_some([f"cases without {name}: {count}" for name, count in summary.absent], "{}")
    _print_some(summary.unread, "not searched: {}")
    _print_some(summary.missing, "the source of case {} is gone")
    _print_files(summary.refused, "rejected", summary)
    _print_files(summary.set_aside, "set aside", summary)
    if summary.set_aside:
        print("  --keep PATTERN takes them all the same; --exclude PATTERN leaves them out without a word")
    _print_some(summary.overview, "{}")
    if summary.contact_sheet:
        print(f"One look finds wrong scans and masks: {summary.contact_sheet}")
    if summary.histograms:
        print(f"Sizes, spacings, intensities and masks of all cases: {summary.histograms}")


def print_classes(labelled):
    """The classes of a dataset, and what is odd about them."""
    from nnssl_plugin.intake.labelled import describe, warn_of_rare_classes, warn_of_similar_classes
    from nnssl_plugin.io.text import some

    print(f"{labelled.path}: {len(labelled.labels.cases)} cases with class labels.")
    print("\n".join(describe(labelled.labels)))
    for warning in [*warn_of_similar_classes(labelled.labels), *warn_of_rare_classes(labelled.labels)]:
        print(f"Warning: {warning}")
    if labelled.dropped:
        print(f"Warning: {len(labelled.dropped)} rows are left out with their rejected scans: {some(labelled.dropped)}")
    if labelled.left_out:
        print(f"{labelled.left_out} scans without a row are left out.")
    if labelled.unlabelled:
        print(
            f"Warning: {len(labelled.unlabelled)} cases of the dataset have no row and are not used for "
            f"classification: {some(labelled.unlabelled)}"
        )


def _bytes(count):
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _print_files(rows, what, summary):
    from nnssl_plugin.intake.overview import count_reasons

    if not rows:
        return
    print(f"{len(rows)} {what}, see {summary.folder / 'rejected.csv'}:")
    groups = [
        f"{count} x {kind}, for example {row.source}" if count > 1 else f"{row.source}: {row.reason}"
        for count, kind, row in count_reasons(rows)
    ]
    _print_some(groups, "{}")


def _print_some(texts, line):
    from nnssl_plugin.io.text import printable

    for text in texts[:SHOWN]:
        print("  " + line.format(printable(text)))
    if len(texts) > SHOWN:
        print(f"  and {len(texts) - SHOWN} more")
