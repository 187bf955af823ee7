"""What every method file shares: arguments, device, backbones, and the small helpers of the training loop.

Shapes: B batch, N samples, S image side in pixels, d features.

Command, at the end of the file:
    python common.py pretrain --backbone vit     make tiny/vit.pt, the tiny preset's stand-in for ImageNet
"""

import contextlib
import copy
import functools
import hashlib
import logging
import os
import sys
import time
from importlib import metadata

import numpy as np
import torch
from torch import nn

import data

HERE = os.path.dirname(os.path.abspath(__file__))
CHECKPOINTS = {  # the exact ImageNet checkpoints of the released benchmark, as timm names them
    "vit": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "swin": "swinv2_tiny_window8_256.ms_in1k",
    "resnet": "resnet152.a1_in1k",
}
TINY_SIZE = 48  # pixels


# ---- arguments -------------------------------------------------------------------------------------------------------
def parser(description, settings, protocols=("ilcv", "slcv")):
    """The command line that all methods share. `settings` is the method's table {name: (paper, tiny)}."""

    def default(name):
        return "paper {}, tiny {}".format(*settings[name]) if name in settings else "not used by this method"

    p = data.argument_parser(description)
    p.add_argument("--backbone", default="vit", help="vit, swin, resnet or any timm model id (default: vit)")
    p.add_argument("--protocol", default="ilcv", choices=protocols, help="how samples become folds (default: ilcv)")
    p.add_argument("--data", metavar="PATH", help="processed folder (default: the synthetic stream)")
    which = f"in this order, of {', '.join(data.TABLE1)} (default: {' '.join(data.STREAM)})"
    p.add_argument("--sessions", nargs="+", default=data.STREAM, metavar="NAME", help=which)
    p.add_argument("--preset", choices=("paper", "tiny"), help="settings (default: paper with --data, tiny without)")
    p.add_argument("--weights", metavar="PATH", help="weight file, or none for random (default: the preset's)")
    p.add_argument("--folds", nargs="+", type=int, metavar="I", help="only these folds, counted from 0 (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of the training; folds and stream have theirs (default: 0)")
    p.add_argument("--epochs-first", type=int, help=f"in the first session (default: {default('epochs_first')})")
    p.add_argument("--epochs-next", type=int, help=f"in each later session (default: {default('epochs_next')})")
    p.add_argument("--lr", type=float, help=f"learning rate (default: {default('lr')})")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    p.add_argument("--out", default="results", metavar="DIR", help="for the results, one per --data (default: results)")
    p.add_argument("--resume", action="store_true", help="keep the finished folds of the same run")
    return p


def parse(p, settings):
    """Parse and check the command line. Returns the arguments, every name of `settings` with its value, and

    method            the script's name
    variant           empty; a method sets it when one of its controls runs, and it becomes part of the run's name
    image_size        S
    mean, std         of the checkpoint, 3 floats each
    checkpoint        what the weights are, in words
    device            torch.device
    changed           what overrides the preset, in words
    default_sessions  whether the sessions are the paper's four
    lr_is_default     whether --lr was left out
    threads           of the CPU; None on other devices, where no number depends on it
    versions          of the packages
    Ends with one line on a wrong value.
    """
    args = p.parse_args()
    for flag, instead in (("data", "the synthetic stream is taken"), ("weights", "the preset's are taken")):
        if getattr(args, flag) == "":
            data.fail(f"--{flag} is empty; without --{flag} {instead}")
    args.method, args.variant = os.path.splitext(os.path.basename(sys.argv[0]))[0], ""
    args.preset = args.preset or ("paper" if args.data else "tiny")
    if "epochs_next" not in settings:
        args.epochs_next = None  # RanPAC trains in the first session only
    overrides = {name: getattr(args, name) for name in ("epochs_first", "epochs_next", "lr", "weights")}
    args.lr_is_default = args.lr is None
    args.changed = [f"{name}={os.path.basename(str(v))}" for name, v in overrides.items() if v is not None]
    args.default_sessions = args.sessions == data.STREAM
    args.versions = {name: metadata.version(name) for name in ("torch", "timm", "numpy", "pillow")}
    for name, (paper, tiny) in settings.items():
        if getattr(args, name, None) is None:
            setattr(args, name, tiny if args.preset == "tiny" else paper)
    for name in args.sessions:
        if name not in data.TABLE1 or args.sessions.count(name) > 1:
            data.fail(f"--sessions {name}: each must be one of {', '.join(data.TABLE1)}, named once")
    for flag in ("epochs_first", "epochs_next", "lr"):
        if getattr(args, flag) is not None and not 0 < getattr(args, flag) < float("inf"):
            data.fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be a finite number greater than 0")
    if not 0 <= args.seed < 2**32:
        data.fail(f"--seed {args.seed}: must be at least 0 and less than 2**32")
    args.device = _device(args.device)
    args.threads = torch.get_num_threads() if args.device.type == "cpu" else None  # on a GPU no result depends on it
    _describe_backbone(args)
    return args


def _device(name):
    """The torch.device that --device names, tried out; and torch's determinism, for the whole process."""
    # Under torchrun every process gets its own device (and, in protocols.Run, its own folds).
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and os.environ.get("LOCAL_RANK"):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError("not one of cpu, cuda, mps")
    except Exception as error:  # torch raises a different type for every way in which a device can be missing
        data.fail(f"--device {name}: {str(error).splitlines()[0]}")
    # Training on CUDA is in bfloat16 (autocast); everything else is in full float32, and the same in every run. A timm
    # model that CUDA cannot train so stops with torch's own words. (mps lacks a deterministic max pooling.)
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=device.type == "mps")
    torch.utils.deterministic.fill_uninitialized_memory = False  # else every torch.empty is filled first
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS's products may differ
    return device


def load_sessions(args):
    """The sessions that the arguments ask for: a list of data.Session. Says when they are synthetic, or how whole."""
    if args.data:
        sessions = data.load(args.data, args.sessions, args.image_size)
        counts = [f"{s.name} {len(s.keys)} of {sum(data.COUNTS[s.name].values())}" for s in sessions]
        print(f"samples, of those in the official sheets: {', '.join(counts)}")
        return sessions
    print(f"Synthetic stream, {args.preset} preset: made-up flow images, numbers not comparable with the paper's.")
    return data.synthetic(args.image_size, sessions=args.sessions)


def launch(main, kept="finished folds are kept, --resume goes on from them"):
    """Run a script's main function; Ctrl-C ends it with one line that says what is `kept`."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {kept}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `python ranpac.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
        raise SystemExit(1) from None


# ---- backbones -------------------------------------------------------------------------------------------------------
def _describe_backbone(args):
    """Check --backbone and --weights and set args.image_size, .mean, .std, .checkpoint without building anything."""
    if args.preset == "tiny":
        if args.backbone not in CHECKPOINTS:
            known = ", ".join(CHECKPOINTS)
            data.fail(f"--backbone {args.backbone}: the tiny preset has {known}; others need --preset paper")
        args.image_size, args.mean, args.std = TINY_SIZE, [0.5] * 3, [0.5] * 3
        args.weights = args.weights or os.path.join(HERE, "tiny", f"{args.backbone}.pt")
    else:
        import timm

        name = CHECKPOINTS.get(args.backbone, args.backbone)
        try:
            known = timm.is_model(name.split(".")[0])
            config = timm.get_pretrained_cfg(name) if known else None
        except RuntimeError:  # a known model with an unknown tag
            config = None
        if config is None:
            data.fail(f"--backbone {args.backbone}: must be vit, swin, resnet or a timm model id (timm.list_models())")
        args.image_size, args.mean, args.std = config.input_size[-1], list(config.mean), list(config.std)
        args.checkpoint = f"{name}, as timm downloads it"
    if args.weights == "none":
        args.checkpoint = "random weights"
    elif args.weights:
        if not os.path.isfile(args.weights):
            data.fail(f"{args.weights}: no such weight file; --weights none starts from random weights")
        with open(args.weights, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        args.checkpoint = f"{os.path.basename(args.weights)}, sha256 {digest[:12]}"


def make_backbone(args):
    """The pretrained backbone, in eval mode, on the device: images (B, 3, S, S) -> features (B, .num_features).

    timm with num_classes=0 gives the class token after the last norm (ViT) or the pooled features (Swin, ResNet).
    Ends with one line where the weights cannot be downloaded or read, or do not match.
    """
    import timm

    torch.manual_seed(args.seed)  # for --weights none
    if args.preset == "tiny":
        backbone = tiny_backbone(args.backbone)
    else:
        name = CHECKPOINTS.get(args.backbone, args.backbone)
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries would bury the one line below
        try:
            backbone = timm.create_model(name, pretrained=args.weights is None, num_classes=0)
        except Exception as error:  # hub, network and file errors have no common type
            if args.weights is not None:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            data.fail(f"cannot download {name} ({reason[:100]}); pass a file with --weights PATH, or take"
                      " --weights none or --preset tiny")  # fmt: skip
    if args.weights not in (None, "none"):
        _load_weights(backbone, args.weights)
    backbone.eval()
    with torch.no_grad():  # the width, measured: timm's own attribute means different things in different families
        features = backbone(torch.zeros(1, 3, args.image_size, args.image_size))
    if features.ndim != 2:
        data.fail(f"--backbone {args.backbone}: gives {tuple(features.shape)}, not one feature vector per image")
    backbone.num_features = features.shape[1]
    return backbone.to(args.device, memory_format=torch.channels_last)  # convolutions run faster in it


def tiny_backbone(name):
    """The tiny preset's networks: the three families of the paper, 48 px, 0.55 to 0.7 million parameters."""
    from timm.models.resnet import BasicBlock, ResNet
    from timm.models.swin_transformer_v2 import SwinTransformerV2
    from timm.models.vision_transformer import VisionTransformer

    if name == "vit":
        return VisionTransformer(img_size=TINY_SIZE, patch_size=12, embed_dim=96, depth=6, num_heads=3, num_classes=0)
    if name == "swin":
        return SwinTransformerV2(img_size=TINY_SIZE, patch_size=6, window_size=4, embed_dim=64, depths=(2, 2),
                                 num_heads=(2, 4), num_classes=0)  # fmt: skip
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(24, 48, 96, 192), num_classes=0)


def require_plain_vit(args):
    """End with one line unless --backbone is a ViT that prompts can be put into. No weights are loaded for this check.

    It must be exactly timm's VisionTransformer with plain blocks, a class token that has a position, and no other token
    beside the patches. The prompt methods take its parts and put them together again (l2p.py, dualprompt.py); any other
    part would silently be left out.
    """
    import timm
    from timm.models import vision_transformer

    if args.preset == "tiny":
        vit = tiny_backbone(args.backbone)
    else:
        vit = timm.create_model(CHECKPOINTS.get(args.backbone, args.backbone), num_classes=0)  # random weights

    def plain(block):
        if type(block) is not vision_transformer.Block or type(block.attn) is not vision_transformer.Attention:
            return False
        extras = getattr(block.attn, "gate", None), getattr(block.attn, "norm", None)
        return all(extra is None or isinstance(extra, nn.Identity) for extra in extras)

    fits = (
        type(vit) is vision_transformer.VisionTransformer
        and vit.cls_token is not None
        and vit.num_prefix_tokens == 1
        and vit.pos_embed is not None
        and vit.pos_embed.shape[1] == vit.patch_embed.num_patches + 1
        and not vit.dynamic_img_size
        and vit.global_pool == "token"
        and isinstance(vit.fc_norm, nn.Identity)
        and len(vit.blocks) >= 5  # DualPrompt's last prompts sit in the fifth
        and all(plain(block) for block in vit.blocks)
    )
    if not fits:
        data.fail(f"--backbone {args.backbone}: {args.method} needs a plain ViT with a class token, such as vit")


def _load_weights(backbone, path):
    """Load a .pt, .pth, .bin or .safetensors file. A classifier in the file is left out; all else must match."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for inner in ("state_dict", "model"):  # the usual wrappings
                state = state.get(inner, state)
            state = {key: value for key, value in state.items() if isinstance(key, str) and torch.is_tensor(value)}
    except Exception as error:  # a broken file can raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        data.fail(f"{path}: not a readable weight file ({reason[:120]})")
    own = {key: value.shape for key, value in backbone.state_dict().items()}
    classifier = ("head.", "fc.", "classifier.")
    state = {key: value for key, value in state.items() if key in own or not key.startswith(classifier)}
    found = {key: value.shape for key, value in state.items()}
    wrong = sorted(key for key in own.keys() | found.keys() if own.get(key) != found.get(key))
    if wrong:
        data.fail(f"{path}: does not fit this backbone; {len(wrong)} entries missing, unknown or of another shape,"
                  f" the first: {wrong[0]}")  # fmt: skip
    backbone.load_state_dict(state)


# ---- the loop's small helpers ----------------------------------------------------------------------------------------
def seed(args, fold):
    """Seed a fold's training (new heads, shuffling, drop-path): it is the same whatever folds ran before."""
    torch.manual_seed(args.seed * 1000 + fold)


@functools.cache  # made once per device: a copy from the host in every step would make the device wait
def _moments(mean, std, device):
    return torch.tensor(mean, device=device).view(3, 1, 1), torch.tensor(std, device=device).view(3, 1, 1)


def normalize(images, args):
    """uint8 images (B, 3, S, S) -> float32 with the mean and std that the checkpoint expects, on their device."""
    mean, std = _moments(tuple(args.mean), tuple(args.std), images.device)
    return (images.float() / 255 - mean) / std


def batches(count, size, device="cpu"):
    """Indices 0..count-1, shuffled, as a list of tensors (size,). A last one of one is dropped: BatchNorm needs two.

    They are drawn on the CPU, so the order is the same on every device.
    """
    assert size > 1, "batches of one are all dropped"
    return [piece for piece in torch.randperm(count).to(device).split(size) if len(piece) > 1]


def steps_per_epoch(count, size):
    """How many tensors `batches` gives."""
    return count // size + (count % size > 1)


def autocast(args):
    """bfloat16 for matrix products and convolutions in training, on CUDA only."""
    return torch.autocast("cuda", torch.bfloat16) if args.device.type == "cuda" else contextlib.nullcontext()


@torch.no_grad()
def extract(network, images, args, *others, batch=256):
    """network(normalised images, *others) for all uint8 images (N, 3, S, S), in float32: (N, ...).

    Without gradients and without autocast. `others` are tensors (N, ...) that go along. Whoever calls it has set the
    network to eval mode.
    """
    parts = zip(images.split(batch), *(other.split(batch) for other in others))
    return torch.cat([network(normalize(x, args), *rest).float() for x, *rest in parts])


def check_finite(loss, fold, session, epoch):
    """Stop with one line when training has diverged. Called once per epoch, since it waits for the device."""
    if not torch.isfinite(loss):
        data.fail(f"the loss is {loss.item()} in fold {fold}, session {session}, epoch {epoch + 1}; try a smaller --lr")


def estimate(args, backbone, sessions, run):
    """In the paper preset on a CPU: time a training step and print how long training will take at least.

    It counts the epochs of the backbone; FOSTER's second network, --joint's growing data and all tests come on top.
    """
    if args.preset == "tiny" or args.device.type != "cpu" or not run.folds:
        return
    backbone = copy.deepcopy(backbone).train()
    batch = torch.from_numpy(sessions[0].images[: args.batch])
    for _ in range(2):  # the second step is timed, the first one warms up
        begin = time.perf_counter()
        backbone(normalize(batch, args).requires_grad_()).sum().backward()  # through a frozen ViT, too
    seconds = (time.perf_counter() - begin) / len(batch)
    epochs = [args.epochs_first] + [args.epochs_next or 0] * (len(sessions) - 1)  # RanPAC has no later ones
    images = sum(e * len(run.parts(fold, t)[0]) for fold in run.folds for t, e in enumerate(epochs))
    print(f"The paper preset on this CPU: at least {images * seconds / 60:.0f} minutes of training the backbone."
          " --preset tiny takes minutes; --device cuda is what this preset is made for.", flush=True)  # fmt: skip


# ======================================================================================================================
# The command below makes the tiny preset's weight files. No method needs it to be read.
# ======================================================================================================================
def random_flows(random, count, size, bumps=6):
    """Flow fields of bumps anywhere, in any direction: clean (N, S, S, 2), and as seen, with drift and noise.

    No face, no action unit, no emotion: general sight, as ImageNet is to faces.
    """
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
    seen = clean + drift + np.einsum("ncd,yxd->nyxc", turn, grid) + noise * data.smooth_noise(random, count, size, 12)
    return clean, seen


def pretrain(args):
    """Train a tiny backbone to see through drift and noise: from the picture predict the clean flow on a 6 x 6 grid."""
    torch.manual_seed(args.seed)
    random = np.random.RandomState(args.seed)
    images = torch.empty(args.images, 3, TINY_SIZE, TINY_SIZE, dtype=torch.uint8)
    targets = torch.empty(args.images, 72)  # 6 x 6 cells, x and y
    for i in range(0, args.images, 1000):
        clean, seen = random_flows(random, min(1000, args.images - i), TINY_SIZE)
        images[i : i + 1000] = torch.from_numpy(data.flow_to_image(seen))
        # The picture's value is relative to its strongest motion, so the target is too. 7 makes its variance about 1.
        relative = 7 * clean / np.hypot(seen[..., 0], seen[..., 1]).max((1, 2))[:, None, None, None]
        cells = relative.reshape(-1, 6, TINY_SIZE // 6, 6, TINY_SIZE // 6, 2).mean((2, 4))
        targets[i : i + 1000] = torch.from_numpy(cells.reshape(-1, 72))
    args.device, args.mean, args.std = torch.device("cpu"), [0.5] * 3, [0.5] * 3
    held_out = args.images // 50  # the first 2 % are never trained on
    backbone = tiny_backbone(args.backbone)
    network = nn.Sequential(backbone, nn.Linear(backbone.num_features, 72))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    per_epoch = steps_per_epoch(args.images - held_out, args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.epochs * per_epoch, pct_start=0.05)
    begin = time.perf_counter()
    for epoch in range(args.epochs):
        network.train()
        for batch in batches(args.images - held_out, args.batch):
            batch = batch + held_out
            loss = nn.functional.smooth_l1_loss(network(normalize(images[batch], args)), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        test = nn.functional.smooth_l1_loss(extract(network, images[:held_out], args), targets[:held_out]).item()
        blind = nn.functional.smooth_l1_loss(torch.zeros_like(targets[:held_out]), targets[:held_out]).item()
        speed = (epoch + 1) * per_epoch * args.batch / (time.perf_counter() - begin)
        print(f"epoch {epoch + 1:2d}/{args.epochs}  held-out loss {test:.4f} (predicting no motion: {blind:.4f})"
              f"  {speed:.0f} images/s", flush=True)  # fmt: skip
    command = f"python common.py pretrain --backbone {args.backbone} --images {args.images} --epochs {args.epochs}"
    made = {
        "command": f"{command} --batch {args.batch} --seed {args.seed}",
        "held_out_loss": test,
        "no_motion_loss": blind,
        "torch": str(torch.__version__),
    }
    state = {key: v.half() if v.is_floating_point() else v for key, v in backbone.state_dict().items()}
    try:
        torch.save({"state_dict": state, "made": made}, args.out + ".part")
        os.replace(args.out + ".part", args.out)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch's own, for a full disk
        data.fail(f"{args.out}: cannot be written ({error})")
    print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.2f} MB")


def main():
    p = data.argument_parser(__doc__)
    p.add_argument("command", choices=["pretrain"])
    p.add_argument("--backbone", choices=list(CHECKPOINTS), default="vit")
    p.add_argument("--images", type=int, default=100_000, help="patterns to make up (default: 100000)")
    p.add_argument("--epochs", type=int, default=6, help="(default: 6)")
    p.add_argument("--batch", type=int, default=64, help="(default: 64)")
    p.add_argument("--seed", type=int, default=0, help="(default: 0)")
    p.add_argument("--out", help="(default: tiny/BACKBONE.pt beside this file)")
    args = p.parse_args()
    args.out = args.out or os.path.join(HERE, "tiny", f"{args.backbone}.pt")
    for flag, least in (("images", 100), ("epochs", 1), ("batch", 2), ("seed", 0)):
        if getattr(args, flag) < least:
            data.fail(f"--{flag} {getattr(args, flag)}: must be at least {least}")
    try:
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        with open(args.out + ".part", "wb"):
            pass  # better to learn it before than after the training
        os.remove(args.out + ".part")
    except OSError as error:
        data.fail(f"{args.out}: cannot be written ({error.strerror})")
    pretrain(args)


if __name__ == "__main__":
    launch(main, "nothing was written")
