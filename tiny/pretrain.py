"""Make a weight file of the tiny preset: a small network, pre-trained to see motion through drift and noise.

The tiny preset starts from tiny/vit.pt, swin.pt or resnet.pt, as the paper preset does from ImageNet's checkpoints.
They are trained on flow images of random bumps, without faces, action units or emotions, to predict the clean flow on a
grid of 6 x 6 cells; the last layer is then thrown away.

    python -m tiny.pretrain --backbone vit       6 to 17 minutes on two cores; makes tiny/vit.pt anew

Shapes: B batch, N images, S image side in pixels, K bumps of motion.
"""

import io
import os
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import common
import data
import protocols
from tiny import stream


def random_flows(random, count, size, bumps=6):
    """Flow fields of bumps anywhere, in any direction: clean (N, S, S, 2), and as seen, with drift and noise."""
    line = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    place = random.uniform(-1, 1, (2, count, bumps, 1)).astype(np.float32)
    width = random.uniform(0.06, 0.3, (count, bumps, 1)).astype(np.float32)
    angle = random.uniform(0, 2 * np.pi, (count, bumps))
    strength = np.exp(random.normal(0, 0.5, (count, bumps)))
    strength *= random.rand(count, bumps) < random.uniform(0.1, 1, (count, 1))  # some bumps are absent
    motion = (strength[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)).astype(np.float32)
    across, down = (np.exp(-((line - p) ** 2) / (2 * width**2)) for p in place)  # (N, K, S) each
    clean = np.einsum("nkc,nky,nkx->nyxc", motion, down, across, optimize=True)
    drift = random.normal(0, 0.15, (count, 1, 1, 2)).astype(np.float32)
    turn = random.normal(0, 0.1, (count, 2, 2)).astype(np.float32)
    grid = np.stack(np.broadcast_arrays(line[None, :], line[:, None]), -1)
    noise = np.exp(random.uniform(np.log(0.03), np.log(0.3), (count, 1, 1, 1))).astype(np.float32)
    seen = clean + drift + np.einsum("ncd,yxd->nyxc", turn, grid) + noise * stream.smooth_noise(random, count, size, 12)
    return clean, seen


def make_images(count, seed):
    """The images (N, 3, S, S) uint8 of random flows, and the clean flow to predict from each (N, 72): 6 x 6 cells."""
    random, size = np.random.RandomState(seed), common.TINY_SIZE
    images, targets = torch.empty(count, 3, size, size, dtype=torch.uint8), torch.empty(count, 72)
    for i in range(0, count, 1000):
        clean, seen = random_flows(random, min(1000, count - i), size)
        images[i : i + 1000] = torch.from_numpy(data.flow_to_image(seen))
        # The image's value is relative to its strongest motion, so the target is too. 7 makes its variance about 1.
        relative = 7 * clean / np.hypot(seen[..., 0], seen[..., 1]).max((1, 2))[:, None, None, None]
        cells = relative.reshape(-1, 6, size // 6, 6, size // 6, 2).mean((2, 4))
        targets[i : i + 1000] = torch.from_numpy(cells.reshape(-1, 72))
    return images, targets


def normalise(images):
    return (images.float() / 255 - 0.5) / 0.5


def main():
    p = common.parser(__doc__)
    p.add_argument("--backbone", choices=list(common.TINY), default="vit", help="(default: vit)")
    for flag, default in (("images", 100_000), ("epochs", 6), ("batch", 64), ("seed", 0)):
        p.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=f"(default: {default})")
    p.add_argument("--out", metavar="FILE", help="(default: tiny/BACKBONE.pt beside this script)")
    args = p.parse_args()
    for flag, least in (("images", 100), ("epochs", 1), ("batch", 2), ("seed", 0)):
        if not least <= getattr(args, flag) < 2**32:
            sys.exit(f"error: --{flag} {getattr(args, flag)}: must be at least {least} and less than 2**32")
    out = os.path.join(common.HERE, "tiny", f"{args.backbone}.pt") if args.out is None else args.out
    if not os.path.basename(out) or os.path.isdir(out):
        sys.exit(f"error: --out {out!r}: must name a file")
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    protocols.write(f"{out}.try", b"")  # a folder that cannot be written to is better known before the training
    os.remove(f"{out}.try")

    import timm  # here, since it takes seconds: --help and mistakes come at once

    torch.manual_seed(args.seed)
    images, targets = make_images(args.images, args.seed)
    held_out, trained = args.images // 50, args.images - args.images // 50  # the first 2 % are never trained on
    name, smaller = common.TINY[args.backbone]
    backbone = timm.create_model(name, num_classes=0, **smaller)
    network = nn.Sequential(backbone, nn.Linear(backbone.eval()(normalise(images[:1])).shape[1], 72))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05, fused=True)
    steps = args.epochs * (trained // args.batch + (trained % args.batch > 1))  # `batches` drops a last batch of one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    begin = time.perf_counter()
    for epoch in range(args.epochs):
        network.train()
        for batch in common.batches(trained, args.batch, 1, "cpu"):
            batch = batch + held_out  # (B,)
            loss = F.smooth_l1_loss(network(normalise(images[batch])), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        predicted = common.extract(network, normalise(images[:held_out]))
        test = F.smooth_l1_loss(predicted, targets[:held_out]).item()
        none = F.smooth_l1_loss(torch.zeros_like(predicted), targets[:held_out]).item()
        speed = (epoch + 1) * trained / (time.perf_counter() - begin)
        print(f"epoch {epoch + 1}/{args.epochs}  held-out loss {test:.4f} (predicting no motion: {none:.4f})  "
              f"{speed:.0f} images/s", flush=True)  # fmt: skip
    typed = " ".join(f"--{name} {getattr(args, name)}" for name in ("backbone", "images", "epochs", "batch", "seed"))
    made = {"command": f"python -m tiny.pretrain {typed}", "held_out_loss": test, "no_motion_loss": none}
    state = {key: v.half() if v.is_floating_point() else v for key, v in backbone.state_dict().items()}
    file = io.BytesIO()
    torch.save({"state_dict": state, "made": made | {"torch": str(torch.__version__)}}, file)
    protocols.write(out, file.getvalue())
    print(f"{out}: {len(file.getvalue()) / 1e6:.2f} MB")


if __name__ == "__main__":
    common.launch(main)
