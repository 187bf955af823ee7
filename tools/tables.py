"""The paper's Tables 2 and 3 as one command: run every line of them, and print the report.

    python -m tools.tables                          on the synthetic stream, in results/table
    python -m tools.tables --data prepared          on images of the licensed datasets, by the paper's settings
    python -m tools.tables --data prepared --seeds 0 1 2 --controls --dry-run      only the commands, for a cluster

Started again, it goes on where it stopped: finished folds are kept. There run as many at once as there are CUDA
devices, each on a device of its own, or without one as many as there are cores, each on one thread.
"""

import concurrent.futures
import os
import queue
import shlex
import subprocess
import sys
import time

import torch

import common
import data

METHODS = ("finetune", "foster", "der", "l2p", "dualprompt", "ranpac")
FROZEN = ["ranpac.py", "--epochs-first", "0"]  # the ridge on the network as it came


def commands(seeds=(0,), controls=False, shared=()):
    """What is run: the words after `python`, a list per line of the tables and seed, each with `shared` at its end."""
    lines = []
    for protocol in ("slcv", "ilcv"):  # Table 2
        for backbone in ("resnet", "vit", "swin"):
            methods = [name for name in METHODS if backbone == "vit" or name not in ("l2p", "dualprompt")]
            scripts = [[f"{name}.py"] for name in methods]
            if controls:
                scripts += [["-m", f"controls.{name}"] for name in ("joint", "norch", "linear")]
                scripts += [FROZEN, [*FROZEN, "--weights", "none"]]
            lines += [[*script, "--backbone", backbone, "--protocol", protocol] for script in scripts]
        if controls:
            lines.append(["-m", "controls.pixels", "--protocol", protocol])
    loso = ["--protocol", "loso", "--sessions", "casme2"]  # Table 3
    lines += [["finetune.py", "--backbone", backbone, *loso] for backbone in ("resnet", "vit", "swin")]
    return [[*line, "--seed", str(seed), *shared] for seed in seeds for line in lines]


def devices():
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return names[:count] if names[0] else [str(i) for i in range(count)]


def run_all(lines, jobs):
    """Run the commands, `jobs` at a time; the list of those that failed, each with its error's last line."""
    failed, start, free, found = [], time.time(), queue.SimpleQueue(), devices()
    for i in range(jobs):
        free.put({"CUDA_VISIBLE_DEVICES": found[i % len(found)]} if found else {"OMP_NUM_THREADS": "1"})

    def run(words):
        own = free.get()
        try:
            return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=os.environ | own)
        finally:
            free.put(own)

    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        waiting = {pool.submit(run, words): " ".join(words) for words in lines}
        finished = data.progress(concurrent.futures.as_completed(waiting), "runs", len(lines))
        for done, future in enumerate(finished, 1):
            result, name, state = future.result(), waiting[future], "done"
            if result.returncode:
                state = "failed"
                failed.append(f"python {name}: {(result.stderr.strip() or 'no word').splitlines()[-1]}")
            left = f"{len(lines) - done} of {len(lines)} left after {time.time() - start:.0f} s"
            finished.write(f"{left}; {state}: {name}", sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C what has not begun is not begun any more
    return failed


def main():
    p = common.parser(__doc__)
    p.add_argument("--data", metavar="PATH", help="processed folder (default: the synthetic stream)")
    p.add_argument("--preset", choices=("paper", "tiny"), help="settings (default: paper with --data, tiny without)")
    p.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="each line with each (default: 0)")
    p.add_argument("--controls", action="store_true", help="also the controls, and RanPAC on the network untouched")
    p.add_argument("--out", default=os.path.join("results", "table"), metavar="DIR", help="(default: results/table)")
    p.add_argument("--jobs", type=int, metavar="N", help="at a time (default: one per CUDA device, else one per core)")
    p.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    args = p.parse_args()
    if not all(0 <= seed < 2**32 for seed in args.seeds):
        sys.exit(f"error: --seeds {' '.join(map(str, args.seeds))}: each must be at least 0 and less than 2**32")
    jobs = len(devices()) or os.cpu_count() if args.jobs is None else args.jobs
    if not args.out or args.data == "" or jobs < 1:
        sys.exit("error: --data and --out take a folder's name, --jobs a number of at least 1")
    given = [(f"--{name}", vars(args)[name]) for name in ("data", "preset", "out")]
    shared = [word for flag, value in given if value for word in (flag, value)]
    lines = commands(dict.fromkeys(args.seeds), args.controls, shared)
    if args.dry_run:
        print("\n".join(shlex.join(["python", *words]) for words in lines))
        return
    if args.data is not None and not os.path.isdir(args.data):
        sys.exit(f"error: --data {args.data!r}: no such folder")
    failed = run_all(lines, jobs)
    subprocess.run([sys.executable, "-m", "tools.report", args.out])
    if failed:
        print("\n".join(failed), file=sys.stderr)
        sys.exit(f"error: {len(failed)} runs failed; the same command runs them again")


if __name__ == "__main__":
    common.launch(main)
