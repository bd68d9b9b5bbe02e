"""Makes small pools as LAION, DataComp and PromptDet's retrieval publish them, and what faiss finds in them: python make.py rpl.npz, with the arrays that
RPL's own code made (see ../promptdet/make.py).

laion/      three shards `img_emb/img_emb_K.npy` (f16) and `metadata/metadata_K.parquet` (snappy, columns of LAION-400M's embeddings). Some rows have no
            direction (zero, NaN, infinite), no URL, or are unsafe for work; some share a URL or an MD5.
datacomp/   the same rows as `NAME.npz` (two arrays; one file compressed, the others not) and `NAME.parquet` (gzip, DataComp's columns).
metadata.h5 the same metadata in HDF5 as clip-retrieval writes it: the group `dataset`, one resizable gzip dataset of UTF-8 a column.
prompts.safetensors, classes.json   five class embeddings, not of unit length; three base classes.
expected.json   by class what `faiss.IndexFlatIP` finds for each query of unit length: of the rows that may be found, of unit length, the best
            24 with their inner products; and the numbers of rows by what they are.

rpl/        the 50 rows (f32), URLs and table of five classes that RPL's retrieval was run with, best 12 each, and the URLs that it wrote for its base classes.

Versions: Python 3.11, numpy 2.4.6, pyarrow 26.0.1, h5py 3.16.0, faiss-cpu 1.15.1.
Tolerance: rows exactly (none of these neighbours are closer than 1e-5); inner products 1e-6, sums of 16 products in f32.
"""

import json
import struct
import sys
from pathlib import Path

import faiss
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

D, K = 16, 24
SIZES = [50, 30, 40]
here = Path(__file__).parent
random = np.random.default_rng(20)
n = sum(SIZES)
rows = random.normal(size=(n, D)).astype(np.float16)
rows[5], rows[60, 3], rows[100, 7] = 0, np.nan, np.inf
url = [f"http://images.example/{row}.jpg" for row in range(n)]
md5 = [f"{row:032x}" for row in range(n)]
nsfw = ["UNLIKELY"] * n
caption = [f"picture {row}, \u00fcber" for row in range(n)]
for row in (7, 70):
    nsfw[row] = "NSFW"
nsfw[9], nsfw[90] = "UNSURE", None
url[11], url[81] = None, ""

table = random.normal(size=(5, D)).astype(np.float32) * 7
unit = table / np.linalg.norm(table, axis=1, keepdims=True)
bad = {5, 60, 100}
left_out = {7, 70, 11, 81}
wide = rows.astype(np.float32)
found = [row for row in range(n) if row not in bad | left_out]
index = faiss.IndexFlatIP(D)
index.add(wide[found] / np.linalg.norm(wide[found], axis=1, keepdims=True))
scores, hits = index.search(unit, K)
places = np.array(found)[hits]
# The second hit of class 0 has the URL of the first, the fourth of class 1 the MD5 of its third.
url[places[0][1]] = url[places[0][0]]
md5[places[1][3]] = md5[places[1][2]]
expected = {
    "hits": [[{"place": int(place), "similarity": float(score)} for place, score in zip(*pair)] for pair in zip(places, scores)],
    "urls": url,
    "rows": n,
    "candidates": n - len(left_out),
    "unsafe": 2,
    "without_url": 2,
}
(here / "expected.json").write_text(json.dumps(expected) + "\n")
(here / "classes.json").write_text(json.dumps({"base": ["ant", "bee", "cat"], "novel": ["dog", "eel"]}) + "\n")



def write_prompts(path: Path, table: np.ndarray) -> None:
    header = {
        "__metadata__": {"names": json.dumps(["ant", "bee", "cat", "dog", "eel"])},
        "embeddings": {"dtype": "F32", "shape": list(table.shape), "data_offsets": [0, table.nbytes]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + table.tobytes())


write_prompts(here / "prompts.safetensors", table)

start = 0
for shard, size in enumerate(SIZES):
    part = slice(start, start + size)
    start += size
    laion = pa.table(
        {
            "image_path": [f"{row:09}" for row in range(size)],
            "caption": caption[part],
            "NSFW": nsfw[part],
            "similarity": [0.3] * size,
            "LICENSE": ["?"] * size,
            "url": url[part],
            "md5": md5[part],
        }
    )
    for folder in ("img_emb", "metadata"):
        (here / "laion" / folder).mkdir(parents=True, exist_ok=True)
    np.save(here / "laion/img_emb" / f"img_emb_{shard}.npy", rows[part])
    pq.write_table(laion, here / "laion/metadata" / f"metadata_{shard}.parquet", compression="snappy")
    (here / "datacomp").mkdir(exist_ok=True)
    save = np.savez_compressed if shard == 1 else np.savez
    save(here / "datacomp" / f"{shard:03}abc.npz", b32_img=rows[part], l14_img=np.zeros((size, 24), np.float16))
    # A probability instead of a word.
    punsafe = [0.9 if word == "NSFW" else 0.01 for word in nsfw[part]]
    datacomp = pa.table({"uid": md5[part], "url": url[part], "text": caption[part], "punsafe": pa.array(punsafe, pa.float64())})
    pq.write_table(datacomp, here / "datacomp" / f"{shard:03}abc.parquet", compression="gzip")

with h5py.File(here / "metadata.h5", "w") as file:
    group = file.create_group("dataset")
    for name, values in (("url", url), ("caption", caption), ("NSFW", nsfw), ("md5", md5)):
        values = np.array(["" if value is None else value for value in values], dtype=object)
        column = group.create_dataset(name, shape=(0,), maxshape=(None,), dtype=h5py.string_dtype("utf-8"), compression="gzip", chunks=(16,))
        # As they come, a batch at a time.
        for first in range(0, n, 50):
            batch = values[first : first + 50]
            column.resize((first + len(batch),))
            column[first:] = batch

published = np.load(sys.argv[1])
(here / "rpl").mkdir(exist_ok=True)
np.save(here / "rpl" / "img_emb_0.npy", published["retrieve/embeddings"])
urls = list(range(50))
for first, second in published["retrieve/duplicate_pairs"].tolist():
    urls[max(first, second)] = min(first, second)
pq.write_table(pa.table({"url": [f"http://images.example/{url}" for url in urls]}), here / "rpl" / "metadata_0.parquet")
write_prompts(here / "rpl.safetensors", published["retrieve/table"].astype(np.float32))
by_class = {str(place): published[f"retrieve/class{place}"].tolist() for place in published["retrieve/base"].tolist()}
(here / "rpl.json").write_text(json.dumps(by_class) + "\n")
