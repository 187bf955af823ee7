"""The paper's Tables 2 and 3 as one command: run every row of them, and print the report.

    python -m tools.tables                          on the synthetic stream, in results/table
    python -m tools.tables --data prepared          on images of the licensed datasets, by the paper's settings
    python -m tools.tables --data prepared --seeds 0 1 2 --controls --dry-run      only the commands, for a cluster
    python -m tools.tables --alike                  how far the synthetic stream is from real flow, three minutes

Started again, it goes on where it stopped: finished folds are kept. There run as many at once as there are CUDA
devices, each on a device of its own, or without one as many as there are cores, each on one thread.
"""

import concurrent.futures
import contextlib
import dataclasses
import glob
import importlib
import io
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import torch

import common
import data
import protocols
from tools import report

METHODS = ("finetune", "foster", "der", "l2p", "dualprompt", "ranpac")
FROZEN = ["ranpac.py", "--epochs-first", "0"]  # the ridge on the network as it came

ALIKE = ["casme2", "samm"]
REAL = {  # on 255 real flow images of the two, without `others`, tiny preset, SLCV; the images are licensed, not here
    # script and flags: accuracy after session 1 and 2, and after session 2 on the tests of each
    "controls.pixels": (86.2, 67.5, None, None),
    "ranpac --epochs-first 0": (82.0, 62.6, None, None),
    "controls.joint": (84.4, 64.4, 72, 53),
    "ranpac": (84.4, 59.0, 74, 39),
    "finetune": (84.4, 50.7, 59, 42),
}


def commands(seeds=(0,), controls=False, shared=()):
    """What is run: the words after `python`, one list per row and seed; `shared` stands at the end of each."""
    rows = []
    for protocol in ("slcv", "ilcv"):  # Table 2
        for backbone in ("resnet", "vit", "swin"):
            methods = [name for name in METHODS if backbone == "vit" or name not in ("l2p", "dualprompt")]
            scripts = [[f"{name}.py"] for name in methods]
            if controls:
                scripts += [["-m", f"controls.{name}"] for name in ("joint", "norch", "linear")]
                scripts += [FROZEN, [*FROZEN, "--weights", "none"]]
            rows += [[*script, "--backbone", backbone, "--protocol", protocol] for script in scripts]
        rows += [["-m", "controls.pixels", "--protocol", protocol]] * controls
    loso = ["--protocol", "loso", "--sessions", "casme2"]  # Table 3
    rows += [["finetune.py", "--backbone", backbone, *loso] for backbone in ("resnet", "vit", "swin")]
    return [[*row, "--seed", str(seed), *shared] for seed in seeds for row in rows]


def devices():
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return names[:count] if names[0] else [str(i) for i in range(count)]


@contextlib.contextmanager
def ending(pool):
    """The pool; after an error or Ctrl-C what has not begun is not begun any more."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def run_all(rows, jobs):
    """Run the rows, `jobs` at a time; the list of those that failed, each with its error's last line."""
    failed, start, free, found = [], time.time(), queue.SimpleQueue(), devices()
    for i in range(jobs):
        free.put({"CUDA_VISIBLE_DEVICES": found[i % len(found)]} if found else {"OMP_NUM_THREADS": "1"})

    def run(words):
        own = free.get()
        try:
            return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=os.environ | own)
        finally:
            free.put(own)

    with ending(concurrent.futures.ThreadPoolExecutor(jobs)) as pool:
        waiting = {pool.submit(run, words): " ".join(words) for words in rows}
        finished = data.progress(concurrent.futures.as_completed(waiting), "rows", len(rows))
        for done, future in enumerate(finished, 1):
            result, name = future.result(), waiting[future]
            if result.returncode:
                failed.append(f"python {name}: {(result.stderr.strip() or 'no word').splitlines()[-1]}")
            state = "failed" if result.returncode else "done"
            left = f"{len(rows) - done} of {len(rows)} left after {time.time() - start:.0f} s"
            finished.write(f"{left}; {state}: {name}", sys.stderr)
    return failed


def run_here(script, *flags, device="cpu"):
    """Run a script's main() in this process, from the start and without its lines; its folds {fold: arrays}."""
    module = importlib.import_module(script)
    with tempfile.TemporaryDirectory() as out:
        words = [module.__file__, "--device", device, "--out", out, *flags]
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(sys, "argv", words):
            module.main()
        return report.read_run(*glob.glob(os.path.join(out, "*", "*")))[1]


def run_alike(name, seed):
    """What REAL has of a script, in %, but on CASME II and SAMM of the synthetic stream with this seed."""
    sessions, (script, *flags) = [], name.split()
    for session in data.synthetic(common.TINY_SIZE, seed, ALIKE):
        kept = session.labels != "others"
        arrays = {key: getattr(session, key)[kept] for key in ("images", "labels", "subjects", "keys")}
        emotions = [word for word in session.emotions if word != "others"]
        sessions.append(dataclasses.replace(session, emotions=emotions, **arrays))
    with mock.patch.object(data, "synthetic", lambda *words, **others: sessions):
        folds = run_here(script, "--preset", "tiny", "--protocol", "slcv", "--sessions", *ALIKE, *flags)
    return [*protocols.curve(folds)[:, :2].mean(0), *protocols.sources(folds, 1)]


def alike(seeds):
    """Print the table that the cameras of tiny/stream.py were calibrated by, as means over seeds of the stream."""
    print(f"Real flow of CASME II and SAMM (without others) / the synthetic stream, seeds {' '.join(map(str, seeds))}")
    print("after S1, S2: accuracy in %, SLCV, mean over folds; tests: those of each session after S2, folds pooled\n")
    columns = ["after S1", "after S2", "CASME II's tests", "SAMM's tests"]
    print(" " * 26 + "".join(f"{word:>24s}" for word in columns))
    for name, real in REAL.items():
        pairs = zip(real, np.mean([run_alike(name, seed) for seed in seeds], 0))
        cells = [f"- / {made:.1f}" if r is None else f"{r} / {made:.1f} ({made - r:+.1f})" for r, made in pairs]
        print(f"{name:26s}" + "".join(f"{cell:>24s}" for cell in cells), flush=True)


def main():
    p = common.parser(__doc__)
    p.add_argument("--data", metavar="PATH", help="processed folder (default: the synthetic stream)")
    p.add_argument("--preset", choices=("paper", "tiny"), help="settings (default: paper with --data, tiny without)")
    p.add_argument("--seeds", nargs="+", type=int, metavar="N", help="each row with each (default: 0)")
    p.add_argument("--alike", action="store_true", help="only that table; --seeds are the stream's (default: 0 1 2)")
    p.add_argument("--controls", action="store_true", help="also the controls, and RanPAC on the network untouched")
    p.add_argument("--out", default=os.path.join("results", "table"), metavar="DIR", help="(default: results/table)")
    p.add_argument("--jobs", type=int, metavar="N", help="at a time (default: one per CUDA device, else one per core)")
    p.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    args = p.parse_args()
    if not all(0 <= seed < 2**32 for seed in args.seeds or ()):
        sys.exit(f"error: --seeds {' '.join(map(str, args.seeds))}: each must be at least 0 and less than 2**32")
    if args.alike:
        if args.data is not None or args.preset or args.controls or args.jobs is not None or args.dry_run:
            p.error("--alike takes --seeds and nothing else")
        return common.launch(lambda: alike(args.seeds or [0, 1, 2]), "nothing is kept")
    jobs = len(devices()) or os.cpu_count() if args.jobs is None else args.jobs
    if not args.out or args.data == "" or jobs < 1:
        sys.exit("error: --data and --out take a folder's name, --jobs a number of at least 1")
    given = [(f"--{name}", vars(args)[name]) for name in ("data", "preset", "out")]
    shared = [word for flag, value in given if value for word in (flag, value)]
    rows = commands(dict.fromkeys(args.seeds or [0]), args.controls, shared)
    if args.dry_run:
        print("\n".join(shlex.join(["python", *words]) for words in rows))
        return
    if args.data is not None and not os.path.isdir(args.data):
        sys.exit(f"error: --data {args.data!r}: no such folder")
    failed = run_all(rows, jobs)
    subprocess.run([sys.executable, "-m", "tools.report", args.out])
    if failed:
        print("\n".join(failed), file=sys.stderr)
        sys.exit(f"error: {len(failed)} runs failed; the same command runs them again")


if __name__ == "__main__":
    common.launch(main)
