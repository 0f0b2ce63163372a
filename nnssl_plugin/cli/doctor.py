"""Is everything in order, and what will nnU-Net find? Run it first, and whenever something is wrong.

    nnssl_plugin doctor
    nnssl_plugin doctor -d 501 -device cuda
    nnssl_plugin doctor --json report.json

Each finding that is not in order comes with the command that mends it. Exit code 0: no problem (warnings are
allowed); 1: at least one problem.
"""

import logging
import os
import sys

from nnssl_plugin.doctor.examination import examination
from nnssl_plugin.doctor.finding import PROBLEM
from nnssl_plugin.doctor.report import as_json, section_lines, summary
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json


def add_arguments(parser):
    parser.add_argument("-d", metavar="ID", help="look at this dataset too: ID or full name")
    parser.add_argument("-device", choices=("cpu", "cuda"), help="what you mean to train on; cuda demands a GPU")
    parser.add_argument("--json", metavar="FILE", help="also write the findings to this file")


def run(args):
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    findings = []
    for section in examination(os.environ, device=args.device, dataset=args.d):
        findings += section
        for line in section_lines(section, encoding=sys.stdout.encoding or "ascii"):
            print(line, flush=True)
    print(f"\n{summary(findings)}")
    if args.json:
        try:
            write_json(args.json, as_json(findings))
        except OSError as error:
            raise UserError(f"{args.json} cannot be written: {error}", "Name another file with --json.") from error
    return int(any(finding.status == PROBLEM for finding in findings))
