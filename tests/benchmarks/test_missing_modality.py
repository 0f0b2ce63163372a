"""The table of the benchmark on missing modalities."""

import runpy


def test_the_table_has_means_and_ranges_over_the_seeds_that_are_there(repository):
    script = runpy.run_path(str(repository / "benchmarks" / "missing_modality.py"))
    shown = {"all": 0.5, "zeros": 0.25, "mean": 0.3, "template": 0.4}
    dice = {"0": {"scratch": shown, "mae": shown}, "1": {"scratch": dict.fromkeys(shown, 1.0)}}
    header, _, scratch, mae, plain, *_ = script["table"](dice).splitlines()
    assert header == "| fine-tuning | all | zeros | mean | template |"
    assert scratch.startswith("| `scratch` | 0.750 (0.500 to 1.000) | 0.625 (0.250 to 1.000) |")
    assert mae.startswith("| `mae` | 0.500 (0.500 to 0.500) |") and plain.startswith("| `plain` |")
