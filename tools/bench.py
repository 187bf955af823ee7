"""What things cost, in seconds and memory, and as ratios, which hold on other machines too.

python -m tools.bench                                      all parts: less than four minutes on two quiet cores
python -m tools.bench --parts ridge loop --device cpu      only these, on this device
python -m tools.bench --parts scripts -- --backbone swin   what stands behind -- goes to every script
"""

import contextlib
import glob
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import common
import finetune
import ranpac

SCRIPTS = ["finetune", "der", "foster", "l2p", "dualprompt", "ranpac"]
SCRIPTS += [f"controls.{name}" for name in ("joint", "norch", "linear", "pixels")]
M, EPOCHS, IMAGES = 10_000, 10, 512  # random features of `ridge`, epochs of `loop`, images of `backbones`
PROCESS = r"""  # of a script, which at its end says its peak memory; that of a whole process on Linux only
import importlib, os, re, sys, torch
script = importlib.import_module(sys.argv.pop(1))
sys.argv[0] = script.__file__
script.main()
if torch.cuda.is_initialized():
    print("MiB", torch.cuda.max_memory_allocated() // 2**20)
elif os.path.exists("/proc/self/status"):
    print("MiB", int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) // 2**10)
"""


def arguments(*words):
    """What a script gets from these flags in the tiny preset; torch is then set up as scripts set it up."""
    with mock.patch.object(sys, "argv", ["bench.py", "--preset", "tiny", *words]):
        return common.parse("", {})


def seconds(device, work, *inputs):
    """Wall seconds of work(*inputs), until the device has done all that it was given."""
    begin = time.perf_counter()
    work(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def bare(name, device, count, epochs=1):
    """A tiny network with a head, images (count, 3, S, S), and a function: epochs of forward, backward and step."""
    args = arguments("--backbone", name, "--device", str(device))
    backbone = common.make_backbone(args)
    network = nn.Sequential(backbone, nn.Linear(backbone.num_features, 5).to(device)).train()
    optimizer = torch.optim.AdamW(network.parameters(), 5e-4, fused=True)
    images = torch.randn(count, 3, backbone.image_size, backbone.image_size, device=device)
    labels = torch.randint(5, (count,), device=device)

    def train():
        for _ in range(epochs):
            for x, y in zip(images.split(32), labels.split(32)):
                with common.autocast(args):
                    logits = network(x)
                loss = F.cross_entropy(logits.float(), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return network, images, train


def low_rank(device, m):
    """Seconds of RanPAC's ridge in each of four sessions with the benchmark's training counts."""
    ridge, rows, times = ranpac.LowRankRidge(m), 0, []

    def session(h, y):  # what ranpac.py does with a session's features
        h = ranpac.to_float64(h)
        gram = h @ h.T
        lam = ranpac.choose_lambda(h, y, gram)
        ridge.update(h, y, gram)
        ridge.weights(lam)

    for n, emotions in ((197, 5), (108, 5), (233, 6), (688, 7)):
        h = (torch.randn(n, 96) @ torch.randn(96, m)).relu()
        y = F.pad(F.one_hot(torch.randint(emotions, (n,)), emotions), (rows, 0))
        times.append(seconds(device, session, h.to(device), y.to(device)))
        rows += emotions
    return times


def scripts(device, flags):
    print("\nOne fold of each script: seconds of the command, and its peak memory (on CUDA that of tensors)")
    for script in SCRIPTS:
        with tempfile.TemporaryDirectory() as out:
            words = [sys.executable, "-c", PROCESS, script, "--device", str(device), "--folds", "0", "--out", out]
            begin = time.perf_counter()
            done = subprocess.run([*words, *flags], cwd=common.HERE, capture_output=True, text=True)
            spent = time.perf_counter() - begin
        peak = re.search(r"^MiB (\d+)$", done.stdout, re.M)
        text = f"{spent:6.1f} s  {peak[1] if peak else '?':>6s} MiB"
        if done.returncode:
            text = (done.stderr.strip() or "failed").splitlines()[-1]
        print(f"{script:16s} {text}", flush=True)


def ridge(device, flags):
    print(f"\nRidge over four sessions, M = {M}, the benchmark's sample counts (197, 108, 233, 688 to train on)")
    low_rank(device, 100)  # CUDA's libraries start
    times, count = low_rank(device, M), len(ranpac.LAMBDAS)
    print(f"low rank, {count} lambdas, float64, seconds per session:", ", ".join(f"{spent:.2f}" for spent in times))
    h = torch.randn(197, M, dtype=torch.float64, device=device)
    once = seconds(device, torch.linalg.solve, h.T @ h + torch.eye(M, dtype=h.dtype, device=device), h.T[:, :5])
    dense = 4 * (count + 1) * once  # in each session one for every lambda, and one for the classifier
    print(f"dense M x M, float64, a solve for every lambda, as released: {dense:.0f} s, scaled from one, {once:.2f} s")
    print(f"dense / low rank = {dense / sum(times):.0f}", flush=True)


def loop(device, flags):
    print("\nA session of finetune.py, with its tests and lines / bare forward, backward and step on as many images")
    words = [finetune.__file__, "--device", str(device), "--sessions", "casme2", "--epochs-first", str(EPOCHS)]
    _, _, train = bare("vit", device, 196, EPOCHS)  # as many images as CASME II has to train on in fold 0
    floor = min(seconds(device, train) for _ in range(2))
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        for seed in "01":  # twice, since the same run again would find its fold done
            with mock.patch.object(sys, "argv", [*words, "--folds", "0", "--seed", seed, "--out", out]):
                finetune.main()
        whole = min(np.load(path)["seconds"][0] for path in glob.glob(os.path.join(out, "*", "*", "*.npz")))
    print(f"{whole / floor:.2f}", flush=True)


def backbones(device, flags):
    print("\nTiny backbones, batch 32: training (forward, loss, backward, fused AdamW), and features")
    for name in common.TINY:
        network, images, train = bare(name, device, IMAGES)
        trained = min(seconds(device, train) for _ in range(2))
        seen = min(seconds(device, common.extract, network[0].eval(), images) for _ in range(2))
        print(f"{name:7s} {IMAGES / trained:6.0f} images/s trained, {IMAGES / seen:6.0f} images/s seen")


def main():
    parts = {work.__name__: work for work in (scripts, ridge, loop, backbones)}
    p = common.parser(__doc__)
    p.add_argument("--parts", nargs="+", choices=parts, default=list(parts), metavar="PART", help=", ".join(parts))
    p.add_argument("--device", help="as in the scripts (default: cuda where there is one, else cpu)")
    p.add_argument("flags", nargs="*", metavar="FLAG", help="behind --: of every script")
    typed = p.parse_args()
    device = arguments(*["--device", typed.device] * (typed.device is not None)).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    words = f"torch {torch.__version__}, {device} ({name}), {torch.get_num_threads()} of {os.cpu_count()} threads"
    print(time.strftime("%Y-%m-%d,"), words, flush=True)
    for part in typed.parts:
        parts[part](device, typed.flags)


if __name__ == "__main__":
    common.launch(main, "nothing is kept")
