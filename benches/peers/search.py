"""faiss.IndexFlatIP over rows in memory, one search at a time, so that another program can take turns with it.

Usage: search.py FOLDER D N_HITS N_THREADS; it reads as many rows of `rows.f16` as `n_rows` says and all of `queries.f32`, and says `ready`. Then
it reads numbers of queries, line by line, searches for the first so many, writes `ids.i64` and `scores.f32`, and answers with the seconds that the search took.
"""

import pathlib
import sys
import time

import faiss
import numpy as np


def main():
    folder, (d, n_hits, n_threads) = pathlib.Path(sys.argv[1]), map(int, sys.argv[2:5])
    faiss.omp_set_num_threads(n_threads)
    n_rows = int((folder / "n_rows").read_text())
    queries = np.fromfile(folder / "queries.f32", dtype=np.float32).reshape(-1, d)
    rows = np.memmap(folder / "rows.f16", dtype=np.float16, mode="r", shape=(n_rows, d))
    index = faiss.IndexFlatIP(d)
    for first in range(0, n_rows, 65_536):
        index.add(rows[first : first + 65_536].astype(np.float32))
    print("ready", flush=True)
    for line in sys.stdin:
        clock = time.perf_counter()
        scores, ids = index.search(queries[: int(line)], n_hits)
        seconds = time.perf_counter() - clock
        ids.tofile(folder / "ids.i64")
        scores.tofile(folder / "scores.f32")
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
