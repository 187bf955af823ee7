"""What things cost on this machine's CPU: seconds, and ratios, which hold on other machines too.

python -m tools.bench                         all parts: ten minutes on two quiet cores
python -m tools.bench --parts ridge kept      only these
"""

import argparse
import collections
import contextlib
import importlib
import io
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import timeit
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

import common
import data
import protocols
import ranpac

FROZEN = {  # the networks whose features a method keeps for its steps and tests; v: the variables of its main()
    "der": lambda v, testing: v["extractors"][:-1],
    "foster": lambda v, testing: [v["old"], v["backbone"]][: v["t"] and 1 + (v["student"] != v["old"] and not testing)],
    "l2p": lambda v, testing: [v["vit"]],
    "dualprompt": lambda v, testing: [v["vit"]],
    "ranpac": lambda v, testing: [v["backbone"]] * testing,
}


def seconds(work, *inputs, tries=1):
    """Wall seconds of work(*inputs), the least of `tries`."""
    return min(timeit.repeat(lambda: work(*inputs), number=1, repeat=tries))


def run_here(method, *flags):
    """Run a method's main() in this process, from the start and without its lines; the seconds of its first session."""
    module = importlib.import_module(method)
    with tempfile.TemporaryDirectory() as out:
        words = [module.__file__, "--device", "cpu", "--out", out, *flags]
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(sys, "argv", words):
            module.main()
        with np.load(next(pathlib.Path(out).glob("*/*/fold*.npz"))) as saved:
            return float(saved["seconds"][0])


def ridge(m=10_000):
    print(f"\nRidge over four sessions, M = {m}, the benchmark's sample counts (197, 108, 233, 688 to train on)")
    hs, ys, rows, count = [], [], 0, len(ranpac.LAMBDAS)
    for n, emotions in zip((197, 108, 233, 688), (5, 5, 6, 7)):
        hs.append(torch.randn(n, 96).matmul(torch.randn(96, m)).relu())
        ys.append(F.pad(F.one_hot(torch.randint(emotions, (n,)), emotions), (rows, 0)))
        rows += emotions
    sums = ranpac.LowRankRidge(m)

    def session(h, y):
        sums.update(h, y)
        sums.weights(ranpac.choose_lambda(h, y))

    low_rank = [seconds(session, h, y) for h, y in zip(hs, ys)]
    print(f"low rank, {count} lambdas, float64, seconds per session:", ", ".join(f"{s:.2f}" for s in low_rank))
    h, y = hs[0].double(), ys[0].double()
    once = seconds(torch.linalg.solve, h.T @ h + torch.eye(m, dtype=torch.float64), h.T @ y)
    dense = 4 * (count + 1) * once
    print(f"dense M x M, float64: one solve {once:.1f} s; 4 x ({count} lambdas + 1) of them {dense:.0f} s, scaled")
    print(f"dense / low rank = {dense / sum(low_rank):.0f}")
    for name, sizes in (("samples", [(200, m), (400, m), (800, m)]), ("M", [(400, m // 4), (400, m // 2), (400, m)])):
        inputs = [(torch.randn(n, width), F.one_hot(torch.randint(7, (n,)), 7)) for n, width in sizes]
        times = [seconds(lambda h, y: ranpac.LowRankRidge(h.shape[1]).update(h, y), h, y, tries=3) for h, y in inputs]
        print(f"one update, {name} doubled twice: " + ", ".join(f"x {t / times[0]:.1f}" for t in times))


def bare(name, count, epochs):
    """A tiny network with a head, images (count, 3, S, S), and a function: `epochs` of forward, backward and step."""
    args = argparse.Namespace(backbone=name, preset="tiny", weights=None, seed=0, device=torch.device("cpu"))
    backbone = common.make_backbone(args)
    network = torch.nn.Sequential(backbone, torch.nn.Linear(backbone.num_features, 5)).train()
    optimizer = torch.optim.AdamW(network.parameters(), 5e-4, fused=True)
    images, labels = torch.randn(count, 3, common.TINY_SIZE, common.TINY_SIZE), torch.randint(5, (count,))

    def train():
        for _ in range(epochs):
            for x, y in zip(images.split(32), labels.split(32)):
                loss = F.cross_entropy(network(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return network, images, train


def training(count=1024):
    print("\nTiny backbones, batch 32: training (forward, loss, backward, fused AdamW), and features")
    for name in common.TINY:
        network, images, train = bare(name, count, 1)
        trained = seconds(train, tries=3)
        seen = seconds(common.extract, network[0].eval(), images, tries=3)
        print(f"{name:7s} {count / trained:6.0f} images/s trained, {count / seen:6.0f} images/s seen")


def loop(epochs=20, turns=3):
    print(
        "\nA session of finetune.py, its tests and lines included / bare forward, backward and step on as many images"
    )
    flags = ["--sessions", "casme2", "--folds", "0", "--epochs-first", str(epochs)]
    _, _, train = bare("vit", 196, epochs)  # the training images of CASME II in fold 0
    whole, floor = zip(*[(run_here("finetune", *flags), seconds(train)) for _ in range(turns)])
    print(f"{min(whole) / min(floor):.2f}")


def kept(turns=3, flags=("--folds", "0")):
    print("\nFeatures of frozen networks computed again in every step and test / kept: one trial, vit, tiny preset")
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
            keeping = seconds(run_here, method, *flags)
            with mock.patch.object(torch.Tensor, "backward", step), mock.patch.object(protocols.Run, "record", test):
                times.append((keeping, seconds(run_here, method, *flags)))
        keeping, again = map(min, zip(*times))
        print(f"{method:11s} {again / keeping:.2f}")


def shares(*flags):
    print("\nWhere the seconds of python ranpac.py --backbone vit --protocol ilcv go")
    spent, running = collections.Counter(), []

    def timed(owner, name, label):
        work = getattr(owner, name)

        def wrapped(*inputs, **others):
            running.append(label)
            begin = time.perf_counter()
            result = work(*inputs, **others)
            running.pop()
            spent[label] += (time.perf_counter() - begin) * (not running)  # an update inside choose_lambda counts once
            return result

        return mock.patch.object(owner, name, wrapped)

    spent["imports"] = seconds(subprocess.run, [sys.executable, "-c", "import torch, timm"])
    with (timed(data, "load_sessions", "stream"), timed(common, "extract", "features"),
          timed(ranpac, "choose_lambda", "ridge"), timed(ranpac.LowRankRidge, "update", "ridge"),
          timed(ranpac.LowRankRidge, "weights", "ridge"), timed(protocols.Run, "record", "files")):  # fmt: skip
        total = seconds(run_here, "ranpac", *flags) + spent["imports"]
    spent["training and the rest"] = total - sum(spent.values())
    print(f"in all {total:.0f} s: " + ", ".join(f"{label} {100 * s / total:.0f} %" for label, s in spent.most_common()))


def commands(*flags):
    print("\nWhole commands, tiny preset, vit, ilcv, five folds: seconds, and peak memory where /proc tells it")
    for method in ["finetune", *FROZEN]:
        begin, peak = time.perf_counter(), 0
        with tempfile.TemporaryDirectory() as out:
            words = [sys.executable, f"{common.HERE}/{method}.py", "--device", "cpu", "--out", out, *flags]
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
            while process.poll() is None:
                with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{process.pid}/status") as file:
                    peak = max(peak, int(re.findall(r"VmHWM:\s+(\d+)", file.read())[0]))
                time.sleep(0.1)
        assert process.returncode == 0, method
        print(f"{method:11s} {time.perf_counter() - begin:4.0f} s  {peak / 1024:5.0f} MiB")


def main():
    parts = {work.__name__: work for work in (ridge, training, loop, kept, shares, commands)}
    p = common.parser(__doc__)
    p.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="(default: all)")
    args, processor = p.parse_args(), "an unnamed processor"
    with contextlib.suppress(OSError, IndexError), open("/proc/cpuinfo") as file:  # on Linux
        processor = re.findall(r"model name\s*: (.*)", file.read())[0]
    print(time.strftime("%Y-%m-%d,"), f"torch {torch.__version__}, {torch.get_num_threads()} threads of {processor}")
    for name in args.parts:
        parts[name]()


if __name__ == "__main__":
    common.launch(main)
