"""What things cost: on this machine's CPU seconds, and ratios, which hold on other machines too; on CUDA what differs.

python -m tools.bench                         all parts on the CPU: five minutes on two quiet cores
python -m tools.bench --parts ridge kept      only these
python -m tools.bench --gpu                   all parts on CUDA, as tables for docs/speed.md; it aims at eight minutes
python -m tools.bench --gpu --compile         training with torch.compile, and nothing else
python -m tools.bench --gpu --device cpu      tries that command out without CUDA: tiny networks, one fold
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import glob
import importlib
import importlib.metadata
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from unittest import mock

import torch
from torch.nn import functional as F

import common
import data
import protocols
import ranpac
from tools import report
from tools.tables import ending, run_here

FROZEN = {  # the networks whose features a method keeps for its steps and tests; v: the variables of its main()
    "der": lambda v, testing: v["extractors"][:-1],
    # While the second network learns, the first; while one network learns from both, both; in tests the first again.
    "foster": lambda v, testing: [v["old"], v["backbone"]][: v["t"] and 1 + (v["student"] != v["old"] and not testing)],
    "l2p": lambda v, testing: [v["vit"]],
    "dualprompt": lambda v, testing: [v["vit"]],
    "ranpac": lambda v, testing: [v["backbone"]] * testing,
}
HERE = common.HERE
SCRIPTS = ["finetune", *FROZEN, *(f"controls.{name}" for name in ("joint", "norch", "linear", "pixels"))]
ON_ALL = ["finetune", "der", "foster", "ranpac"]  # what --gpu runs on the other backbones, too
FAILURES = []  # of --gpu: what failed
stream_of = functools.cache(data.synthetic)  # images of 224 pixels take a quarter of a minute


# ---- what both halves use --------------------------------------------------------------------------------------------
def clock():
    """Seconds, read when CUDA, if used, has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work, *inputs, tries=1):
    """Wall seconds of work(*inputs), the least of `tries`."""
    times = []
    for _ in range(tries):
        begin = clock()
        work(*inputs)
        times.append(clock() - begin)
    return min(times)


def copies(size, sessions):
    """data.synthetic, but its images are made once. Copies, since load_sessions changes them."""
    return [dataclasses.replace(session) for session in stream_of(size) if session.name in sessions]


def bare(name, count, epochs=1, batch=32, device="cpu", preset="tiny", compiled=False):
    """A network with a head, images (count, 3, S, S), and a function: `epochs` of forward, backward and step."""
    words = ["bench", "--backbone", name, "--preset", preset, "--device", device, "--weights", "none"]
    with mock.patch.object(sys, "argv", words):
        args = common.parse("", {})  # it also gives torch the settings that scripts run with
    backbone = common.make_backbone(args)
    network = torch.nn.Sequential(backbone, torch.nn.Linear(backbone.num_features, 5).to(args.device)).train()
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), 5e-4, fused=True)
    images = torch.randn(count, 3, backbone.image_size, backbone.image_size, device=args.device)
    labels = torch.randint(5, (count,), device=args.device)

    def train():
        for _ in range(epochs):
            for x, y in zip(images.split(batch), labels.split(batch)):
                with common.autocast(args):
                    logits = forward(x)
                loss = F.cross_entropy(logits.float(), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return network, images, train


def samples(n, m, emotions=7, rows=0):
    """Made-up features (n, M) and targets (n, rows + emotions) of a session that comes after `rows` rows."""
    h = torch.randn(n, 96).matmul(torch.randn(96, m)).relu()
    return h, F.pad(F.one_hot(torch.randint(emotions, (n,)), emotions), (rows, 0))


def ridge_session(ridge, h, y):
    """What ranpac.py does with a session's features."""
    h = ranpac.to_float64(h)
    gram = h @ h.T
    lam = ranpac.choose_lambda(h, y, gram)
    ridge.update(h, y, gram)
    return ridge.weights(lam)


def low_rank(m, device="cpu"):
    """Seconds of RanPAC's ridge in each of four sessions with the benchmark's training counts."""
    ridge, rows, times = ranpac.LowRankRidge(m), 0, []
    for n, emotions in zip((197, 108, 233, 688), (5, 5, 6, 7)):
        h, y = (values.to(device) for values in samples(n, m, emotions, rows))
        times.append(seconds(ridge_session, ridge, h, y))
        rows += emotions
    return times


# ---- on the CPU ------------------------------------------------------------------------------------------------------
def ridge(m=10_000):
    print(f"\nRidge over four sessions, M = {m}, the benchmark's sample counts (197, 108, 233, 688 to train on)")
    count, times = len(ranpac.LAMBDAS), low_rank(m)
    print(f"low rank, {count} lambdas, float64, seconds per session:", ", ".join(f"{s:.2f}" for s in times))
    h, y = map(torch.Tensor.double, samples(197, m))
    once = seconds(torch.linalg.solve, h.T @ h + torch.eye(m, dtype=torch.float64), h.T @ y)
    dense = 4 * (count + 1) * once  # the last one for the classifier
    print(
        f"dense M x M, float64, a solve for every lambda, as released: {dense:.0f} s, scaled from one of {once:.1f} s"
    )
    print(f"dense / low rank = {dense / sum(times):.0f}")
    for name, sizes in (("samples", [(200, m), (400, m), (800, m)]), ("M", [(400, m // 4), (400, m // 2), (400, m)])):
        times = []
        for n, width in sizes:
            h, y = samples(n, width)
            times.append(seconds(lambda h, y: ridge_session(ranpac.LowRankRidge(h.shape[1]), h, y), h, y, tries=2))
        print(f"one whole session, {name} doubled twice: " + ", ".join(f"x {t / times[0]:.1f}" for t in times))


def training(count=512):
    print("\nTiny backbones, batch 32: training (forward, loss, backward, fused AdamW), and features")
    for name in common.TINY:
        network, images, train = bare(name, count)
        trained = seconds(train, tries=2)
        seen = seconds(common.extract, network[0].eval(), images, tries=2)
        print(f"{name:7s} {count / trained:6.0f} images/s trained, {count / seen:6.0f} images/s seen")


def loop(epochs=10, turns=2):
    print("\nA session of finetune.py, with its tests and lines / bare forward, backward and step on as many images")
    flags = ["--sessions", "casme2", "--folds", "0", "--epochs-first", str(epochs)]
    _, _, train = bare("vit", 196, epochs)  # the training images of CASME II in fold 0
    whole, floor = zip(*[(run_here("finetune", *flags)[0]["seconds"][0], seconds(train)) for _ in range(turns)])
    print(f"{min(whole) / min(floor):.2f}")


def kept(turns=2):
    print("\nFeatures of frozen networks computed again in every step and test / kept: three sessions of 3 epochs, vit")
    flags = ["--folds", "0", "--sessions", *data.STREAM[:3], "--epochs-first", "3"]
    backward, record = torch.Tensor.backward, protocols.Run.record

    def step(loss):  # loss.backward() in main(): its batch goes through the frozen networks once more
        v = sys._getframe(1).f_locals
        for network in FROZEN[v["args"].method](v, False):
            common.extract(network, v["x"][v["batch"]])
        backward(loss)

    def test(run, fold, t, *scores, **others):  # run.record() in main(): so do the tests of the earlier sessions
        v = sys._getframe(1).f_locals
        for network in FROZEN[v["args"].method](v, True):
            for session, tests in zip(run.sessions[:t], run.tests):
                common.extract(network, session.images[tests[fold]])
        record(run, fold, t, *scores, **others)

    for method in FROZEN:
        times = []
        for _ in range(turns):
            with mock.patch.object(data, "synthetic", copies):
                keeping = seconds(run_here, method, *flags)
                with mock.patch.multiple(torch.Tensor, backward=step), mock.patch.multiple(protocols.Run, record=test):
                    times.append((keeping, seconds(run_here, method, *flags)))
        keeping, again = map(min, zip(*times))
        print(f"{method:11s} {again / keeping:.2f}")


def shares(*flags):
    print("\nWhere the seconds of python ranpac.py --backbone vit --protocol ilcv go")
    spent = collections.Counter()

    def timed(owner, name, label):
        work = getattr(owner, name)

        def wrapped(*inputs, **others):
            begin = time.perf_counter()
            result = work(*inputs, **others)
            spent[label] += time.perf_counter() - begin
            return result

        return mock.patch.object(owner, name, wrapped)

    spent["imports"] = seconds(subprocess.run, [sys.executable, "-c", "import torch, timm"])
    with (timed(data, "load_sessions", "stream"), timed(common, "extract", "features"),
          timed(ranpac, "choose_lambda", "ridge"), timed(ranpac.LowRankRidge, "update", "ridge"),
          timed(ranpac.LowRankRidge, "weights", "ridge"), timed(protocols.Run, "record", "files")):  # fmt: skip
        total = seconds(run_here, "ranpac", *flags) + spent["imports"]
    spent["training and the rest"] = total - sum(spent.values())  # h h^T, a small part of the ridge, is in the rest
    print(f"in all {total:.0f} s: " + ", ".join(f"{label} {100 * s / total:.0f} %" for label, s in spent.most_common()))


def commands(*flags):
    print("\nWhole commands, tiny preset, vit, ilcv, one fold: seconds, and peak memory where /proc tells it")
    for method in ["finetune", *FROZEN]:
        begin, peak = time.perf_counter(), 0
        with tempfile.TemporaryDirectory() as out:
            words = [sys.executable, f"{HERE}/{method}.py", "--device", "cpu", "--folds", "0", "--out", out]
            process = subprocess.Popen([*words, *flags], stdout=subprocess.DEVNULL)
            while process.poll() is None:
                with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{process.pid}/status") as file:
                    peak = max(peak, int(re.findall(r"VmHWM:\s+(\d+)", file.read())[0]))
                time.sleep(0.1)
        assert process.returncode == 0, method
        print(f"{method:11s} {time.perf_counter() - begin:4.0f} s  {peak / 1024:5.0f} MiB")


# ---- on CUDA: `device` is "cuda", or "cpu" to try the code -----------------------------------------------------------
@contextlib.contextmanager
def guarded(what):
    """If something fails in here, one line says so and it is counted; the rest goes on."""
    try:
        yield
    except (Exception, SystemExit) as error:
        FAILURES.append(what)
        text = "".join(traceback.format_exception_only(error)).strip()  # to which torchrun adds lines of its own
        lines = re.findall(r"^(?:error|\S+Error): .+", text, re.M) or text.splitlines()
        print(f"failed: {what}: {lines[-1]}", flush=True)


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def table(title, *columns):
    print(f"\n{title}\n")
    row(*columns)
    row(*["---"] * len(columns))


def briefly(script, **values):
    """Flags of one epoch per session and phase, and of the other values, those that the script has."""
    values = {"epochs_first": 1, "epochs_next": 1, **values}
    settings = importlib.import_module(script).SETTINGS
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if name in settings]
    return [word for flag in flags for word in flag]


def scores(device):
    title = "Scores after one step in each session and phase: largest difference / largest score, tiny preset, fold 0."
    hint = "One rounding to bfloat16 is 2^-8 = 0.4 %; the first step of AdamW also follows signs of gradients near 0,"
    more = "and another lambda or prompt may be chosen. Linear and pixels use no bfloat16."
    table(f"{title} {hint} {more}", "script", f"casme2, {device} - cpu", f"samm, {device} - cpu", "")
    for script in SCRIPTS:
        with guarded(script):
            flags = ["--preset", "tiny", "--sessions", "casme2", "samm", "--folds", "0", *briefly(script, batch=4096)]
            tried, cpu = (run_here(script, *flags, device=name)[0] for name in (device, "cpu"))
            errors = [100 * abs(tried[k] - cpu[k]).max() / abs(cpu[k]).max() for k in ("scores_0", "scores_1")]
            most = 0.01 if script in ("controls.linear", "controls.pixels") else 5  # %
            row(script, *(f"{error:.3g} %" for error in errors), f"above {most} %" if max(errors) > most else "")


def torchrun(script, device, folds):
    """The last accuracy in %, the mean over folds, in the tiny preset, with a process for each fold."""
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(folds)]
        words += ["-m", script, "--preset", "tiny", "--device", device, "--out", out, "--folds"]
        words += map(str, range(folds))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=HERE, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        info, saved = report.read_run(*glob.glob(os.path.join(out, "*", "*")))
        if len(saved) != folds:
            sys.exit(f"error: {len(saved)} of {folds} folds")
        return protocols.curve(saved, info["merges"][0])[:, -1].mean()


def accuracies(device):
    folds = 5 if device == "cuda" else 1
    at_once = max(1, min(4, os.cpu_count() // folds))
    table(f"Last accuracy in %, tiny preset, mean of {folds} folds", "script", "cpu", device, "difference", "")
    with ending(concurrent.futures.ThreadPoolExecutor(at_once)) as pool:
        jobs = {script: [pool.submit(torchrun, script, name, folds) for name in ("cpu", device)] for script in SCRIPTS}
        for script in SCRIPTS:
            with guarded(script):
                cpu, tried = (job.result() for job in jobs[script])
                mark = "above 2" if abs(tried - cpu) > 2 else ""
                row(script, f"{cpu:.2f}", f"{tried:.2f}", f"{tried - cpu:+.2f}", mark)


class Watched(list):
    """Batches of a training loop; while it runs, every wait for CUDA is a warning. `steps` gets one entry per step."""

    def __init__(self, batches, steps):
        super().__init__(batches)
        self.steps = steps

    def __iter__(self):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batch in super().__iter__():
                self.steps.append(None)
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")


def watched(script, device, *flags):
    """Seconds of all sessions; on CUDA also the tensors' peak in MiB, and lines that wait for CUDA in its steps."""
    cuda, steps, waits, draw = device == "cuda", [], collections.defaultdict(set), common.batches

    def note(message, category, filename, line, *others):
        """Of a warning: in which step it came, and at which line of ours (a backward pass warns inside of torch)."""
        frame = sys._getframe(1)
        while frame.f_back and os.path.dirname(frame.f_code.co_filename) not in (HERE, os.path.join(HERE, "controls")):
            frame = frame.f_back
        if "called a synchronizing" in str(message):
            waits[f"{os.path.relpath(frame.f_code.co_filename, HERE)}:{frame.f_lineno}"].add(len(steps))

    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    batches = lambda *inputs: Watched(draw(*inputs), steps) if cuda else draw(*inputs)  # noqa: E731
    with (mock.patch.object(common, "batches", batches), mock.patch.object(data, "synthetic", copies),
          warnings.catch_warnings(), mock.patch.object(warnings, "showwarning", note)):  # fmt: skip
        warnings.simplefilter("always")
        spent = sum(run_here(script, *flags, device=device)[0]["seconds"])
    if not cuda:
        return f"{spent:.1f}", "-", "-"
    lines = [f"{line} ({len(w)} of {len(steps)})" for line, w in sorted(waits.items(), key=lambda w: -len(w[1]))]
    return f"{spent:.1f}", f"{torch.cuda.max_memory_allocated() / 2**20:.0f}", ", ".join(lines) or "none"


def sessions(device):
    preset = "paper" if device == "cuda" else "tiny"
    title = f"Four sessions of one epoch, {preset} preset, random weights, synthetic images, fold 0. Memory is that of"
    title += " tensors; a process takes about half a GB more. A line waits in so many of all steps"
    table(title, "script", "backbone", "seconds", "peak MiB", "lines that wait for CUDA")
    for backbone, scripts in {"vit": SCRIPTS, "swin": ON_ALL, "resnet": ON_ALL}.items():
        for script in scripts:
            with guarded(f"{script} --backbone {backbone}"):
                flags = ["--preset", preset, "--backbone", backbone, "--folds", "0", *briefly(script)]
                flags += [] if script == "controls.pixels" else ["--weights", "none"]
                row(script, backbone, *watched(script, device, *flags))


def join(barrier):
    """A process that measures beside others begins."""
    global together
    together = barrier
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word


def rate(name, device, compiled=False, beside=False):
    """Images per second in training at batch 16, measured for 5 s (on the CPU 1 s), together with those beside."""
    preset, least = ("paper", 5) if device == "cuda" else ("tiny", 1)
    try:
        _, _, train = bare(name, 64, batch=16, device=device, preset=preset, compiled=compiled)
        for _ in range(3):
            train()
        clock()
    except BaseException:
        if beside:
            together.abort()  # or the others would wait
        raise
    if beside:
        together.wait(60)
    begin, count = clock(), 0
    while time.perf_counter() < begin + least:
        train()
        count += 64
    return count / (clock() - begin)


def together_rate(jobs):
    """The sum of the rates of processes side by side. If one fails, its error, not that of those that waited for it."""
    concurrent.futures.wait(jobs)
    errors = [error for job in jobs if (error := job.exception())]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return sum(job.result() for job in jobs)


def rates(device):
    preset, count = ("paper", 5) if device == "cuda" else ("tiny", 2)
    columns = ["network", "alone", f"{count} processes side by side, sum"]
    table(f"Images per second in training, {preset} preset, batch 16, eager, on {device}", *columns)
    context = torch.multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    with concurrent.futures.ProcessPoolExecutor(count, context, join, (barrier,)) as pool:
        for name in common.TINY:
            with guarded(name):
                alone = rate(name, device)
                barrier.reset()  # one that failed would have broken it
                jobs = [pool.submit(rate, name, device, beside=True) for _ in range(count)]
                row(name, f"{alone:.0f}", f"{together_rate(jobs):.0f}")


def compiling(device):
    table(f"Images per second in training, batch 16, on {device}", "network", "", "images per second")
    for name, how in itertools.product(common.TINY, ("eager", "torch.compile")):
        with guarded(f"{name}, {how}"):
            row(name, how, f"{rate(name, device, how != 'eager'):.0f}")


def ridges(device):
    paper, tiny = ranpac.SETTINGS["projected"]
    m = paper if device == "cuda" else tiny
    table(f"Seconds of the ridge, M = {m}, on {device}", *(f"session {t + 1}" for t in range(4)))
    with guarded("ridge"):
        low_rank(m, device)  # CUDA's libraries start
        row(*(f"{spent:.3f}" for spent in low_rank(m, device)))


# ---- the command line ------------------------------------------------------------------------------------------------
def main():
    here = {work.__name__: work for work in (ridge, training, loop, kept, shares, commands)}
    there = {work.__name__: work for work in (scores, accuracies, sessions, rates, ridges)}
    p = common.parser(__doc__)
    p.add_argument("--parts", nargs="+", metavar="NAME", help=f"of {', '.join(here)}; with --gpu of {', '.join(there)}")
    p.add_argument("--gpu", action="store_true", help="measure on CUDA")
    p.add_argument("--device", choices=("cuda", "cpu"), help="with --gpu: cpu tries the code (default: cuda)")
    p.add_argument("--compile", action="store_true", help="with --gpu: torch.compile instead of the parts")
    args, processor = p.parse_args(), "an unnamed processor"
    parts = here if not args.gpu else {"compiling": compiling} if args.compile else there
    names, device = args.parts or list(parts), args.device or "cuda"
    if not args.gpu and (args.device or args.compile):
        p.error("--device and --compile go with --gpu")
    if not set(names) <= set(parts):
        p.error(f"--parts {' '.join(names)}: of {', '.join(parts)}")
    if args.gpu and device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --gpu: torch sees no CUDA device here")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as the scripts do in the tiny preset
    with contextlib.suppress(OSError, IndexError), open("/proc/cpuinfo") as file:  # on Linux
        processor = re.findall(r"model name\s*: (.*)", file.read())[0]
    versions, threads = f"torch {torch.__version__}", f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    if args.gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used
        versions += f", CUDA {torch.version.cuda}, timm {importlib.metadata.version('timm')}"
        if device == "cuda":
            torch.cuda.init()
            versions = f"{torch.cuda.get_device_name()}, {versions}"
    print(time.strftime("%Y-%m-%d,"), f"{versions}, {threads} of {processor}", flush=True)
    FAILURES.clear()
    for name in names:
        parts[name](*[device] * args.gpu)
    if FAILURES:
        sys.exit(f"error: {len(FAILURES)} failed: {', '.join(FAILURES)}")


if __name__ == "__main__":
    common.launch(main, "nothing is kept")
