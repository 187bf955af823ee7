"""The results table of the synthetic stream: run everything that it holds, and print it.

    python -m tools.tables               in results/table; started again, it goes on where it stopped

As many runs at a time as there are cores, each on one thread: such small networks gain little from a second one.
"""

import concurrent.futures
import os
import subprocess
import sys
import time

import common

METHODS = ("finetune", "der", "foster", "l2p", "dualprompt", "ranpac")
FROZEN = ["ranpac.py", "--epochs-first", "0"]  # the ridge on the network as it came


def commands():
    """What is run: the words after `python`, one list per row of the table."""
    rows = []
    for backbone in ("vit", "swin", "resnet"):
        methods = [name for name in METHODS if backbone == "vit" or name not in ("l2p", "dualprompt")]
        scripts = [[f"{name}.py"] for name in methods] + [["-m", "controls.linear"], FROZEN]
        scripts += [[*FROZEN, "--weights", "none"]]
        scripts += [["-m", "controls.joint"], ["-m", "controls.norch"]] * (backbone == "vit")
        rows += [[*script, "--backbone", backbone] for script in scripts]
    rows += [["-m", "controls.pixels"]]
    return [[*row, "--protocol", protocol] for protocol in ("ilcv", "slcv") for row in rows]


def run_all(rows, out, jobs):
    """Run the rows, `jobs` at a time; the list of those that failed, each with its error's last line."""
    failed, start = [], time.time()

    def run(words):
        words = [sys.executable, *words, "--out", out]
        return subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(run, words): " ".join(words) for words in rows}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                result, name = future.result(), waiting[future]
                if result.returncode:
                    failed.append(f"python {name}: {(result.stderr.strip() or 'no word').splitlines()[-1]}")
                state = "failed" if result.returncode else "done"
                print(f"{done}/{len(rows)}, {time.time() - start:.0f} s, {state}: {name}", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C the rest is not begun
    return failed


def main():
    p = common.parser(__doc__)
    p.add_argument("--out", default=os.path.join("results", "table"), metavar="DIR", help="(default: results/table)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="at a time (default: one per core)")
    args = p.parse_args()
    if not args.out or args.jobs < 1:
        sys.exit("error: --out takes a folder's name, --jobs a number of at least 1")
    failed = run_all(commands(), args.out, args.jobs)
    subprocess.run([sys.executable, "-m", "tools.report", args.out])
    if failed:
        print("\n".join(failed), file=sys.stderr)
        sys.exit(f"error: {len(failed)} runs failed; the same command runs them again")


if __name__ == "__main__":
    common.launch(main)
