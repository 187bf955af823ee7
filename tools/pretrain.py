"""Make a weight file: a network pre-trained on made-up flow, to see motion through drift and noise.

The tiny preset starts from tiny/vit.pt, swin.pt or resnet.pt, as the paper preset does from ImageNet's checkpoints.
They are trained on flow images of random bumps, without faces, action units or emotions, to predict the clean flow on a
grid of 6 x 6 cells; the last layer is thrown away. Any other timm model can be trained so, too:

    python -m tools.pretrain --backbone vit       a quarter to half an hour on two cores; makes tiny/vit.pt anew
    python -m tools.pretrain --coding uvs --images 400000                       made tiny/vit-uvs.pt, for tools.megc2019
    python -m tools.pretrain --backbone vit_base_patch16_224 --size 96
    python ranpac.py --data processed --backbone vit_base_patch16_224 --weights vit_base_patch16_224-96.pt

It starts from random weights, on CUDA where there is one. Every image is made for one step and then forgotten. (An
older version made vit.pt, swin.pt and resnet.pt from 98,000 images that were seen six times.)

Shapes: B batch, N images, S image side in pixels, K bumps of motion.
"""

import io
import math
import os
import sys

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


def flow_to_uvs(flow):
    """Code flow fields (N, S, S, 2) as RGB images (N, 3, S, S) uint8: u, v and optical strain, sqrt(u_x^2 + v_y^2 +
    (u_y + v_x)^2 / 2), each scaled from 0 to 255 within an image, as the images of tools.megc2019 are."""
    u, v = flow[..., 0], flow[..., 1]
    (u_y, u_x), (v_y, v_x) = np.gradient(u, axis=(1, 2)), np.gradient(v, axis=(1, 2))
    channels = np.stack([u, v, np.sqrt(u_x**2 + v_y**2 + (u_y + v_x) ** 2 / 2)], 1)
    low, high = channels.min((2, 3), keepdims=True), channels.max((2, 3), keepdims=True)
    return np.round(255 * (channels - low) / np.maximum(high - low, 1e-12)).astype(np.uint8)


class Batches(torch.utils.data.Dataset):
    """Batches number 0 to count - 1: images (B, 3, S, S) uint8, and the clean flow to predict (B, 72): 6 x 6 cells."""

    def __init__(self, count, batch, size, seed, coding):
        self.count, self.batch, self.size, self.seed, self.coding = count, batch, size, seed, coding

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        clean, seen = random_flows(np.random.RandomState([self.seed, i]), self.batch, self.size)
        # The image's value is relative to its strongest motion, so the target is too. 7 makes its variance about 1.
        relative = 7 * clean / np.hypot(seen[..., 0], seen[..., 1]).max((1, 2))[:, None, None, None]
        cells = F.adaptive_avg_pool2d(torch.from_numpy(relative).float().permute(0, 3, 1, 2), 6)  # (B, 2, 6, 6)
        images = flow_to_uvs(seen) if self.coding == "uvs" else data.flow_to_image(seen)
        return torch.from_numpy(images), cells.flatten(1)


def main():
    p = common.parser(__doc__)
    p.add_argument("--backbone", default="vit", help="vit, swin, resnet (the tiny ones) or a timm id (default: vit)")
    p.add_argument("--coding", choices=("hsv", "uvs"), default="hsv", help="of the images (default: hsv)")
    p.add_argument("--size", type=int, metavar="S", help="of a timm model's images, in pixels (default: its own)")
    for flag, default in (("images", 600_000), ("batch", 64), ("seed", 0)):
        p.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=f"(default: {default})")
    p.add_argument("--lr", type=float, default=1e-3, metavar="X", help="the largest learning rate (default: 0.001)")
    p.add_argument("--out", metavar="FILE", help="(default: tiny/NAME.pt beside common.py, or ID-S.pt here)")
    args = p.parse_args()
    args.preset = "tiny" if args.backbone in common.TINY else "paper"
    if args.preset == "tiny" and args.size not in (None, common.TINY_SIZE):
        sys.exit(f"error: --size {args.size}: {args.backbone} takes {common.TINY_SIZE} pixels; or name a timm id")
    for flag, least in (("size", 6), ("batch", 2), ("images", args.batch), ("seed", 0)):
        if not least <= (least if getattr(args, flag) is None else getattr(args, flag)) < 2**31:
            sys.exit(f"error: --{flag} {getattr(args, flag)}: must be at least {least} and less than 2**31")
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.weights, args.method = "none", "pretrain"
    backbone = common.make_backbone(args, size=args.size)
    size = backbone.image_size
    name = args.backbone.replace("/", "-") + ("" if args.coding == "hsv" else f"-{args.coding}")
    out = args.out or (
        os.path.join(common.HERE, "tiny", f"{name}.pt") if args.preset == "tiny" else f"{name}-{size}.pt"
    )
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    protocols.write(f"{out}.try", b"")  # a folder that cannot be written to is better known before the training
    os.remove(f"{out}.try")
    held_out = Batches(1 + 500 // args.batch, args.batch, size, args.seed + 2**31, args.coding)  # of another seed
    tests, targets = (torch.cat(parts) for parts in zip(*(held_out[i] for i in range(len(held_out)))))
    made = Batches(args.images // args.batch, args.batch, size, args.seed, args.coding)
    network = nn.Sequential(backbone, nn.Linear(backbone.num_features, 72)).to(args.device)

    def predict(images):  # (B, 3, S, S) uint8 -> (B, 72)
        return network(data.normalise(images.to(args.device), backbone.mean, backbone.std))

    optimizer = torch.optim.AdamW(network.parameters(), args.lr, weight_decay=0.05, fused=True)
    # The learning rate rises for a twentieth of the steps, then falls as a cosine.
    rate = lambda step: min(20 * (step + 1) / len(made), (1 + math.cos(math.pi * step / len(made))) / 2)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    loader = torch.utils.data.DataLoader(made, batch_size=None, num_workers=min(8, os.cpu_count() or 1))
    bar = data.progress(loader, "training")
    for step, (images, clean) in enumerate(bar, 1):
        network.train()
        with common.autocast(args):
            predicted = predict(images)
        loss = F.smooth_l1_loss(predicted.float(), clean.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if 10 * step // len(made) > 10 * (step - 1) // len(made):  # ten times in all
            network.eval()
            predicted = common.extract(predict, tests, size=args.batch).cpu()
            test = F.smooth_l1_loss(predicted, targets).item()
            none = F.smooth_l1_loss(torch.zeros_like(targets), targets).item()
            bar.write(f"{step * args.batch} images  held-out loss {test:.4f} (predicting no motion: {none:.4f})")
            sys.stdout.flush()
            if not math.isfinite(test):
                sys.exit("error: the held-out loss is not finite; try a smaller --lr")
    typed = {name: getattr(args, name) for name in ("backbone", "coding", "images", "batch", "seed", "lr")}
    words = [f"--{name} {value}" for name, value in typed.items()]
    command = " ".join(["python -m tools.pretrain", *words, f"--size {size}"])
    about = {"command": command, "size": size, "held_out_loss": test, "no_motion_loss": none}
    state, file = backbone.cpu().state_dict(), io.BytesIO()
    for key, value in state.items():
        if value.is_floating_point() and value.abs().max() < 6e4:  # else it does not fit into float16
            state[key] = value.half()
    torch.save({"state_dict": state, "made": about | {"torch": str(torch.__version__)}}, file)
    protocols.write(out, file.getvalue())
    print(f"{out}: {len(file.getvalue()) / 1e6:.2f} MB")


if __name__ == "__main__":
    common.launch(main, "nothing is written")
