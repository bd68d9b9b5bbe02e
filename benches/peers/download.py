"""Downloads a list of URLs with img2dataset and prints the seconds that it took: download.py URLS FOLDER N_THREADS N_LINKS.

Two processes, as many threads as requests are to be made at once, files as they come. The number of files must be that of the links.
"""

import pathlib
import sys
import time

from img2dataset import download

if __name__ == "__main__":
    urls, folder, n_threads, n_links = sys.argv[1:5]
    clock = time.perf_counter()
    download(
        url_list=urls,
        output_folder=folder,
        processes_count=2,
        thread_count=int(n_threads) // 2,
        number_sample_per_shard=500,
        resize_mode="no",
        output_format="files",
        enable_wandb=False,
        retries=0,
        timeout=20,
        disallowed_header_directives=[],
    )
    seconds = time.perf_counter() - clock
    n_files = sum(1 for _ in pathlib.Path(folder).glob("*/*.jpg"))
    assert n_files == int(n_links), f"{n_files} files of {n_links} links"
    print(seconds)
