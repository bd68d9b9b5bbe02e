"""Exact search by faiss-cpu 1.15.1 (numpy 2.4.6), and hits of LP-OVOD's own retrieval.

faiss.json: the 100 rows with the largest inner products with each of 17 queries, of 20,000 rows by `IndexFlatIP`. Rows and queries are made by the formula
of `../clip/unit.py`, row r of "search/rows" from number 512 r on, and scaled to unit length (length in f64, quotients rounded to f32). Ids are equal:
neighbours in score are at least 1e-8 apart up to the first that is no hit, and the exact order, in f64, is the one that faiss gives; the script asserts both. Scores
agree to 1e-5 [1e-7 seen]: sums in f32 in another order. The two-stage scheme, chunks of 5,000 rows with 300 hits each and then the best 100 of all, gives the
same; the script asserts that, too.

lp-ovod.json: `python make.py lp-ovod.npz` converts the arrays `retrieve/*`, obtained by running the reference (VinAIResearch/LP-OVOD main `133d26a`, torch
2.11.0, f32; faiss replaced by an exact search that keeps the lower row of equal ones) on 389 rows of 33 images, searched in chunks of 8 images with 40
hits each. Candidates have an objectness of at least f32(0.6): one row has just that, one the next f32 below. Rows are equal, cosines agree to
1e-5. f16 rows are stored as their bits.
"""

import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent / "clip"))
from unit import unit  # noqa: E402

N_ROWS, N_QUERIES, D, N = 20_000, 17, 512, 100


def write(name, golden):
    (HERE / name).write_text(json.dumps(golden, separators=(",", ":")) + "\n")


def vectors(name, n):
    rows = unit(name, n * D).reshape(n, D).astype(np.float64)
    return (rows / np.sqrt((rows**2).sum(1, keepdims=True))).astype(np.float32)


def nearest():
    import faiss

    rows, queries = vectors("search/rows", N_ROWS), vectors("search/queries", N_QUERIES)
    index = faiss.IndexFlatIP(D)
    index.add(rows)
    scores, ids = index.search(queries, N)

    exact = queries.astype(np.float64) @ rows.T.astype(np.float64)
    order = np.argsort(-exact, axis=1, kind="stable")[:, : N + 1]
    gaps = -np.diff(np.take_along_axis(exact, order, 1), axis=1)
    print("smallest gap", gaps.min(), "largest difference", np.abs(np.take_along_axis(exact, ids, 1) - scores).max())
    assert gaps.min() > 1e-8 and (order[:, :N] == ids).all()

    found = [[] for _ in range(N_QUERIES)]
    for first in range(0, N_ROWS, 5000):
        part = faiss.IndexFlatIP(D)
        part.add(rows[first : first + 5000])
        for query, hits in enumerate(zip(*part.search(queries, 300))):
            found[query] += [(-score, first + place) for score, place in zip(*map(np.ndarray.tolist, hits))]
    assert [[place for _, place in sorted(hits)[:N]] for hits in found] == ids.tolist()
    golden = {"faiss": faiss.__version__, "numpy": np.__version__, "ids": ids.tolist()}
    write("faiss.json", golden | {"scores": [[round(float(score), 8) for score in row] for row in scores]})


def lp_ovod(path):
    arrays = np.load(path)
    get = lambda name: arrays[f"retrieve/{name}"]  # noqa: E731
    assert get("hit_row").shape[1] == get("n") and len(get("embeddings_f16")) == get("counts").sum()
    write(
        "lp-ovod.json",
        {
            "counts": get("counts").tolist(),
            "rows_f16": get("embeddings_f16").view(np.uint16).tolist(),
            "objectness": get("proposals")[:, 4].astype(float).tolist(),
            "queries": get("text").astype(float).tolist(),
            "tau": float(get("tau")),
            "limit": int(get("n")),
            "hit_row": get("hit_row").tolist(),
            "hit_cosine": get("hit_cosine").tolist(),
        },
    )


if __name__ == "__main__":
    lp_ovod(sys.argv[1]) if sys.argv[1:] else nearest()
