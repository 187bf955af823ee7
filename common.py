"""What every script shares: arguments, device, backbones, and the small helpers of the training loop.

Shapes: B batch, N samples, S image side in pixels, d features.
"""

import argparse
import contextlib
import copy
import hashlib
import os
import pickle
import sys
import time

import torch
from tqdm import tqdm

import data
import protocols

HERE = os.path.dirname(os.path.abspath(__file__))
CHECKPOINTS = {  # the ImageNet checkpoints of the released benchmark, as timm names them
    "vit": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "swin": "swinv2_tiny_window8_256.ms_in1k",
    "resnet": "resnet152.a1_in1k",
}
TINY_SIZE = 48  # pixels
TINY = {  # the tiny preset's networks, 0.55 to 0.7 million parameters: a timm model, and what is smaller in it
    "vit": ("vit_tiny_patch16_224", dict(img_size=TINY_SIZE, patch_size=12, embed_dim=96, depth=6)),
    "swin": ("swinv2_tiny_window8_256", dict(img_size=TINY_SIZE, patch_size=6, window_size=4, embed_dim=64,
                                             depths=(2, 2), num_heads=(2, 4))),
    "resnet": ("resnet18", dict(layers=(1, 1, 1, 1), channels=(24, 48, 96, 192))),
}  # fmt: skip

# When the code that runs was read: at the start of the process, which Linux tells; else when this file was imported.
LOADED = time.time()
with contextlib.suppress(OSError, AttributeError):
    if not hasattr(sys, "ps1"):  # in a notebook the process is older than the code
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = 1 + int(file.read().rpartition(")")[2].split()[19])  # since boot, field 22, rounded up
        LOADED += ticks / os.sysconf("SC_CLK_TCK") - time.clock_gettime(time.CLOCK_BOOTTIME)


# ---- arguments -------------------------------------------------------------------------------------------------------
def parser(description):
    """A command line whose errors are one line, and whose help keeps the line breaks of the description."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sys.exit(f"error: {message}; see --help")
    return p


def parse(description, settings):
    """The command line of the calling script: what all scripts share, and a flag for each of its `settings`.

    settings  {name: (value in the paper preset, value in the tiny preset)}: int, float, bool or str
    Returns what was typed, checked, with every setting's value and a torch.device, and .method, the script's name;
    .code, hashes of its files; .changed, {name: value} of what differs from the preset; .loaded, which weights.
    """
    script = sys._getframe(1).f_code.co_filename
    if not os.path.isfile(script):
        sys.exit("error: main() stands in no file; results are kept by their code, so write it to a file and import it")
    p = parser(description)
    p.add_argument("--backbone", default="vit", help="vit, swin, resnet or any timm model id (default: vit)")
    p.add_argument("--protocol", default="ilcv", choices=("ilcv", "slcv", "loso"), help="folds (default: ilcv)")
    p.add_argument("--data", metavar="PATH", help="processed folder (default: the synthetic stream)")
    which = f"in this order, of {', '.join(data.DATASETS)} (default: {' '.join(data.STREAM)})"
    p.add_argument("--sessions", nargs="+", default=data.STREAM, choices=data.DATASETS, metavar="NAME", help=which)
    p.add_argument("--preset", choices=("paper", "tiny"), help="settings (default: paper with --data, tiny without)")
    p.add_argument("--weights", metavar="PATH", help="weight file, or none for random (default: the preset's)")
    p.add_argument("--folds", nargs="+", type=int, metavar="I", help="only these folds, counted from 0 (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of the training; folds and stream have theirs (default: 0)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    p.add_argument("--out", default="results", metavar="DIR", help="a run's folder is made below it (default: results)")
    p.add_argument("--save", action="store_true", help="also keep each fold's trained model, beside its file")
    for name, (paper, tiny) in settings.items():
        kind = {"type": type(paper), "metavar": "X"}
        if isinstance(paper, bool):
            kind = {"action": argparse.BooleanOptionalAction}  # --name and --no-name
        p.add_argument(f"--{name.replace('_', '-')}", help=f"(default: paper {paper}, tiny {tiny})", **kind)
    args = p.parse_args()

    args.method, args.loaded = os.path.splitext(os.path.basename(script))[0], "no network"
    args.code = protocols.code_of(os.path.realpath(script), LOADED)
    args.preset = args.preset or ("tiny" if args.data is None else "paper")
    args.changed = {} if args.weights is None else {"weights": os.path.basename(args.weights)}
    for name, (paper, tiny) in settings.items():
        default, value = tiny if args.preset == "tiny" else paper, getattr(args, name)
        if value is None:
            setattr(args, name, default)
        elif value != default:
            args.changed[name] = value
        zero = isinstance(paper, float) or 0 in (paper, tiny) or name.startswith("epochs")
        least = {"batch": 2, "lr": 1e-12}.get(name, 0 if zero else 1)  # BatchNorm needs two images
        if not isinstance(value, (str, bool, type(None))) and not least <= value < float("inf"):
            sys.exit(f"error: --{name.replace('_', '-')} {value}: must be finite and at least {least:g}")
    if len(set(args.sessions)) < len(args.sessions):
        sys.exit(f"error: --sessions {' '.join(args.sessions)}: one is named twice")
    if args.data is not None and not os.path.isdir(args.data):  # before a checkpoint is downloaded for it
        sys.exit(f"error: --data {args.data!r}: no such folder")
    args.device = set_up(args.device, args.preset)
    return args


def set_up(name, preset):
    """The torch.device `name` (None: cuda where there is one, else cpu), in full float32 and deterministic."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name == "cuda" and os.environ.get("LOCAL_RANK"):  # under torchrun (see protocols.Run)
            name = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
        device = torch.zeros(1, device=name).device
    except Exception as error:  # torch raises a different type for every way in which a device can be missing
        sys.exit(f"error: --device {name}: {str(error).splitlines()[0]}")
    if preset == "tiny" and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second one gains a quarter, and loses much when other programs run
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=device.type == "mps")  # which lacks a max pooling
    torch.utils.deterministic.fill_uninitialized_memory = False  # else every torch.empty is filled first
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS's products may differ
    return device


# ---- backbones -------------------------------------------------------------------------------------------------------
def make_backbone(args, parts=None, size=None):
    """The pretrained backbone, in eval mode, on the device: images (B, 3, S, S) -> features (B, d).

    It carries what its images must be (.image_size S; .mean, .std, 3 floats each) and .num_features d.
    parts  (network, x) -> (B, d) puts it together from its parts; where that is not network(x), it is refused
    size   S, where it is neither the model's own nor told by its weight file
    """
    import timm  # here, since it takes seconds: --help and mistakes come at once

    name, smaller, weights = CHECKPOINTS.get(args.backbone, args.backbone), {}, args.weights
    if args.preset == "tiny":
        if args.backbone not in TINY:
            sys.exit(f"error: --backbone {args.backbone}: --preset tiny has {', '.join(TINY)}; take --preset paper")
        name, smaller = TINY[args.backbone]
        weights = os.path.join(HERE, "tiny", f"{args.backbone}.pt") if weights is None else weights
    if weights not in (None, "none"):
        with contextlib.suppress(Exception):  # only files of tools.pretrain tell; what is no weight file is seen below
            size = torch.load(weights, weights_only=True, map_location="cpu")["made"]["size"]
    torch.manual_seed(args.seed)  # for --weights none
    try:
        network = timm.create_model(name, num_classes=0, **smaller)
        config = timm.data.resolve_model_data_config(network)
        if args.preset == "tiny":
            size, config = TINY_SIZE, config | {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        elif size not in (None, config["input_size"][-1]) and network.pretrained_cfg.get("fixed_input_size"):
            network = timm.create_model(name, num_classes=0, img_size=size)
        size = size or config["input_size"][-1]
        network.image_size, network.mean, network.std = size, config["mean"], config["std"]
        # The width is measured: timm's own number means different things in its families.
        _, network.num_features = extract(network.eval(), torch.zeros(2, 3, size, size)).shape
    except Exception:  # timm raises a different type for every way in which a name can be wrong
        what = f"a timm model id that gives one vector for an image of {size or 'its'} pixels"
        sys.exit(f"error: --backbone {args.backbone}: must be vit, swin, resnet or {what}")
    if parts and not _same(network, parts):  # tried before anything is downloaded
        sys.exit(f"error: --backbone {args.backbone}: {args.method} needs a plain ViT with a class token, such as vit")
    try:
        load_weights(network, name, weights)
    except Exception as error:  # hub, network, file and torch errors have no common type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        advice = "" if weights else "; pass a file with --weights PATH, or take --weights none or --preset tiny"
        sys.exit(f"error: {weights or name}: cannot be loaded into this backbone ({reason}){advice}")
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in network.state_dict().values())).hexdigest()
    args.loaded = f"{os.path.basename(weights or name)}, {network.image_size} px, sha256 {digest[:12]}"
    return network.to(args.device, memory_format=torch.channels_last)  # convolutions run faster in it


def load_weights(network, name, weights):
    """Fill a timm model from the file `weights`, from the hub (None: the checkpoint `name`), or not at all ("none").

    A classifier is left out; all else must match, after timm's own conversion of a file from the model's authors.
    """
    import huggingface_hub
    import timm

    if weights == "none":
        return
    if weights is None:
        repository, hub = network.pretrained_cfg.get("hf_hub_id"), huggingface_hub.constants
        if repository and not hub.HF_HUB_OFFLINE:
            if not isinstance(huggingface_hub.try_to_load_from_cache(repository, "model.safetensors"), str):
                size = sum(p.numel() for p in network.parameters()) / 250_000
                what = f"{hub.ENDPOINT}/{repository}, about {size:.0f} MB, once (or --weights FILE)"
                print(f"weights: {what}", flush=True)
                huggingface_hub.model_info(repository, timeout=60)  # a download would wait long for a silent hub
        network.load_state_dict(timm.create_model(name, num_classes=0, pretrained=True).state_dict())
        return
    with open(weights, "rb") as file:
        head = file.read(9)
    if head.startswith(b"version "):
        raise ValueError("a Git LFS pointer, not the file itself, which git lfs pull fetches")
    if head.endswith(b"{") and not weights.endswith(".safetensors"):
        raise ValueError("a safetensors file, whose name must end with .safetensors")
    try:
        state = timm.models.load_state_dict(weights, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError):
        raise ValueError("no torch file, or one that holds more than weights") from None
    for key, value in (network.state_dict() | dict(network.named_buffers())).items():
        there, here = list(state.get(key, value).shape), list(value.shape)
        # timm would stretch what was learned at another size.
        if key.endswith(("pos_embed", "bias_table", "coords_table", "patch_embed.proj.weight")) and there != here:
            raise ValueError(f"{key} is {there}, here {here}: of another image, patch or network size")
    names, convert = network.pretrained_cfg["classifier"], lambda state, _: state
    classifier = tuple(f"{word}." for word in ([names] if isinstance(names, str) else names))
    if {key for key in state if not key.startswith(classifier)} != network.state_dict().keys():
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", convert)
    state = convert(state, network)
    network.load_state_dict({key: value for key, value in state.items() if not key.startswith(classifier)})


@torch.no_grad()
def _same(network, parts):
    """Whether parts(network, x) is network(x), tried with random weights: timm's own first ones hide differences."""
    network, x = copy.deepcopy(network), torch.randn(2, 3, network.image_size, network.image_size)
    for parameter in network.parameters():
        parameter.normal_(0, 0.1)
    try:
        whole, built = network(x), parts(network, x)
        return ((built - whole).norm() <= 1e-3 * whole.norm()).item()
    except Exception:  # no class token, no blocks, other shapes: no plain ViT
        return False


# ---- the loop's small helpers ----------------------------------------------------------------------------------------
def batches(count, size, epochs, device):
    """Shuffled indices of 0..count-1 for all epochs: tensors (size,), to go through once, with a bar on a terminal.

    Drawn on the CPU: the order is the same on every device. A last batch of one is dropped, since BatchNorm needs two.
    """
    orders = [torch.randperm(count).to(device) for _ in range(epochs)]
    return data.progress([batch for order in orders for batch in order.split(size) if len(batch) > 1], "training")


def autocast(args):
    """bfloat16 for matrix products and convolutions in training, on CUDA only."""
    return torch.autocast("cuda", torch.bfloat16) if args.device.type == "cuda" else contextlib.nullcontext()


@torch.no_grad()
def extract(network, images, *others, size=256):
    """network(images, *others), (N, ...) each, `size` at a time, in float32 and without gradients: (N, ...)."""
    parts = list(zip(images.split(size), *(other.split(size) for other in others)))
    return torch.cat([network(*part).float() for part in data.progress(parts, "features")])


def launch(main, kept="finished folds are kept, the same command goes on from there"):
    """Run a script's main function. Ctrl-C ends it with one line that says what is `kept`, a closed pipe with none."""
    with contextlib.suppress(AttributeError):  # what stands in for it in a notebook has no such thing
        sys.stdout.reconfigure(errors="backslashreplace")  # names that are not UTF-8 can be printed, too
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        tqdm.write(f"\ninterrupted; {kept}", sys.stderr)  # clears the bars first
        sys.exit(130)
    except BrokenPipeError:  # `python ranpac.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
        sys.exit(1)
    except OSError as error:  # a folder that cannot be read, a file that cannot be written, a full disk
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror or error}")
