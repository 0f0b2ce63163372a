"""What the verbs ``prepare`` and ``caption`` do, as functions; the package's other functions are those of their verbs.

``nnssl_plugin`` itself offers them all: ``import nnssl_plugin as nnssl; nnssl.prepare(…)``.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnssl_plugin.captions.captioners import open_captioner
from nnssl_plugin.captions.embeddings import EmbeddingSummary, store_embeddings
from nnssl_plugin.captions.triplets import SLICES, caption_dataset
from nnssl_plugin.intake import prepare as intake
from nnssl_plugin.intake.prepare import PrepareOptions, modality_texts
from nnssl_plugin.intake.unlabelled import PrepareSummary
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.raw_folders import raw_dataset_folder

log = logging.getLogger(__name__)


def prepare(
    images: str | Path,
    dataset_id: int,
    name: str,
    *,
    modality: str | None = None,
    modalities: Mapping[str, str] | Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    cases_by: str = "name",
    resample: bool = False,
    class_labels: str | Path | None = None,
    targets: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    series: Sequence[str] = (),
    structures: Sequence[str] = (),
    key_file: str | Path | None = None,
    local: str | Path | None = None,
    suffixes: Sequence[str] = (),
    video: int | None = None,
    processes: int = 2,
) -> PrepareSummary:
    """Make or extend an nnU-Net raw dataset from a folder of scans, DICOM files or 2D images, as ``nnssl_plugin
    prepare`` does.

    Scans that cannot be used are listed, with the reason, in ``rejected.csv`` of the dataset.

    Args:
        images: folder of the scans, searched with its subfolders.
        dataset_id: 1 to 999.
        name: the part after ``DatasetXXX_``.
        modality: ``MR``, ``PET`` or ``CT``, or for 2D images ``grey`` or ``RGB``; also ``noNorm``, ``rescale_to_0_1``.
            None: ``MR``, and ``grey`` for 2D images.
        modalities: channels of a case with several images: name → pattern (or texts ``NAME=PATTERN``, or one path of a
            csv with the columns ``case``, one per modality and perhaps ``label``). What wildcards match names the case.
            Channels that a case lacks are zeros, as ``modalities.json`` says. Of DICOM: name → rule as in ``series``,
            and the case is the study.
        labels: patterns of the cases' segmentations, with ``modalities``; an empty list takes ``labelsTr`` of a folder
            as nnU-Net or the Decathlon has it. None: body masks.
        cases_by: ``name`` or ``folder``, with ``modalities``: what files of one case have in common.
        resample: put images on another grid onto that of the first of the case.
        class_labels: table of class labels for classification; scans without a row are left out.
        targets: columns of the table to predict: ``NAME``, ``NAME:KIND`` or ``NAME:KIND:CLASS,CLASS``.
        include: patterns of scans to take, such as ``siteB/*`` or ``*_T1*``; none: all.
        exclude: patterns of scans to leave out.
        keep: patterns of scans that are never set aside as segmentations or as another modality; what a table of
            classes names never is.
        series: of DICOM: rules, such as ``Modality=MR,SeriesDescription~T1``, of which a series has to fulfil one.
        structures: of DICOM: ``NAME=LABEL`` each, what of RTSTRUCT and SEG becomes the labels.
        key_file: of DICOM: key of the hashes that name cases; None: one in ``local``.
        local: of DICOM: folder for what is not for others; None: ``nnUNet_raw/.nnssl_plugin``.
        suffixes: of BIDS: what the names of the scans end in, such as ``T1w``; none: every anatomical scan.
        video: take videos as volumes of so many evenly spaced frames in three colours.
        processes: worker processes; 1 works in this one.

    Returns:
        the ``folder`` of the dataset in ``nnUNet_raw``, and which scans were ``added``, ``known`` and ``rejected``.

    Raises:
        UserError: no scan can be used, or the table does not fit.
    """
    options = PrepareOptions(
        modality=modality,
        modalities=modality_texts(modalities),
        labels=labels,
        cases_by=cases_by,
        resample=resample,
        include=include,
        exclude=exclude,
        keep=keep,
        suffixes=suffixes,
        video=video,
        series=series,
        structures=structures,
        key_file=key_file,
        local=local,
        class_labels=class_labels,
        targets=targets,
        processes=processes,
    )
    return intake.prepare(images, dataset_id, name, options).summary


def caption(
    dataset: str | int,
    *,
    captioner: str = "template",
    options: Mapping[str, Any] | None = None,
    slices: int = SLICES,
    seed: int = 0,
    body_part: str | None = None,
    window: tuple[float, float] | None = None,
    weights: str | None = None,
    model: str | None = None,
) -> EmbeddingSummary:
    """Choose slices, describe them and store their frozen embeddings, as ``nnssl_plugin caption`` does.

    Args:
        dataset: ID or full name of a raw dataset.
        captioner: who writes the texts: ``template``, ``openai``, ``file``, or your own ``package.module:Class``.
        options: of the captioner, those that differ from its defaults.
        slices: per case.
        seed: draws the slices.
        body_part: goes into the texts, and chooses the window of CT.
        window: centre and width in which captioners see slices; None: for CT by the body part, else percentiles.
        weights: file, folder or open_clip tag of the frozen encoders; None: small random ones, which only tell slices
            apart.
        model: open_clip's architecture of a file or tag, such as ``ViT-B-32``.

    Returns:
        the ``path`` of the embeddings, how many were ``computed`` and ``reused``, and by which ``weights``.

    Raises:
        UserError: for a dataset, captioner or weights that are not there.
    """
    folder = raw_dataset_folder(dataset)
    captions = caption_dataset(
        folder, open_captioner(captioner, options), seed=seed, slices=slices, body_part=body_part, window=window
    )
    if captions.failed or captions.unknown:
        log.warning("Without a text: %s.", some([*captions.failed, *captions.unknown]))
    return store_embeddings(folder, model=model, weights=weights)
