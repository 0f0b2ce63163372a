"""An index of given vectors, without an encoder."""

import nnssl_plugin as nnssl
from nnssl_plugin.data.vector_store import writing
from nnssl_plugin.tasks.retrieval.standardisation import statistics_of


def make_index(folder, vectors, parts=("mean", "maximum"), **columns):
    """Rows ``case_0000`` and so on, two of each subject; further columns by their names."""
    rows = [
        {
            "case": f"case_{n:04d}",
            "part": "",
            "subject": f"subject_{n // 2}",
            "image": "",
            **{k: v[n] for k, v in columns.items()},
        }
        for n in range(len(vectors))
    ]
    facts = {"dimensions": vectors.shape[1], "encoder": {"parts": list(parts)}, "made": {}}
    with writing(folder, facts) as store:
        store.append(vectors, rows)
        store.freeze(statistics_of(vectors))
    return nnssl.load_index(folder)
