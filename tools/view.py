"""The stream to look at: as image files, as one sheet of examples, as counts.

    python -m tools.view export --out processed                    the synthetic stream as a processed folder
    python -m tools.view show --data processed --out sheet.png     a few images of every session and emotion
    python -m tools.view check --data processed                    samples beside the official sheets' counts
    python -m tools.view folds --data processed                    write down the folds, for a folder without folds.csv

Without --data, show and check take the synthetic stream. tools.prepare writes a folds.csv of the official sheets; that
of `folds` holds the folds that the images have had without it, which stay when an image goes.
"""

import io
import os
import sys
import tempfile

from PIL import Image, ImageDraw

import common
import data
import protocols
from tools import prepare


def export(sessions, out):
    """Write sessions as a processed folder of PNG files: data.load then reads the very same images."""
    out = os.path.abspath(out)
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        sys.exit(f"error: {out}: exists already; --out takes a new or an empty folder")
    parent, name = os.path.split(out)
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}.{os.getpid()}.", suffix=".part", dir=parent) as part:
        made = os.path.join(part, name)  # renamed when complete: a folder of the name `out` is never half a stream
        for session in sessions:
            for image, key in zip(session.images, session.keys):
                os.makedirs(os.path.dirname(os.path.join(made, key)), exist_ok=True)
                Image.fromarray(image.transpose(1, 2, 0)).save(os.path.join(made, key))
        os.replace(made, out)
    print(f"{out}: {sum(len(session.keys) for session in sessions)} images")


def show(sessions, out, each=3, side=56):
    """One row per session; of each emotion, by name, one image of each of the first `each` subjects."""
    widest = max(len(session.emotions) for session in sessions)
    margin, gap, band = 70, 10, 16
    sheet = Image.new("RGB", (margin + widest * (each * side + gap), len(sessions) * (side + band + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, session in enumerate(sessions):
        top = row * (side + band + gap) + gap // 2
        draw.text((6, top + band + side // 2 - 6), session.name, fill="black")
        for column, emotion in enumerate(session.emotions):
            left = margin + column * (each * side + gap)
            own = [i for i, word in enumerate(session.labels) if word == emotion]
            draw.text((left, top), f"{emotion} ({len(own)})", fill="black")
            firsts = list({session.subjects[i]: i for i in reversed(own)}.values())[::-1]
            for place, i in enumerate((firsts + [i for i in own if i not in firsts])[:each]):
                image = Image.fromarray(session.images[i].transpose(1, 2, 0)).resize((side, side))
                sheet.paste(image, (left + place * side, top + band))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    protocols.write(out, content.getvalue())
    print(f"{out}: {len(sessions)} sessions")


def check(sessions):
    """Print samples, subjects and emotions of each session, beside the official sheets' counts where they are known."""
    for session in sessions:
        sheet = data.DATASETS[session.name]
        print(f"{session.name:7s} {len(session.keys):5d} samples of {sheet.samples or '?':>5}"
              f"  {len(set(session.subjects.tolist())):4d} subjects of {sheet.subjects or '?':>4}")  # fmt: skip
        for emotion, count in sheet.emotions.items():
            own = int((session.labels == emotion).sum())
            difference = f"   {own - count:+d}" if count not in (None, own) else ""
            print(f"    {emotion:11s} {own:5d} of {'?' if count is None else count:>5}{difference}")


def folds(sessions, path):
    """Write folds.csv into a processed folder: a line per image, with the folds that protocols.Run gives it without."""
    lines = []
    for session in sessions:
        own = [{"session": session.name, "subject": int(subject), "onset": "", "key": str(key), "reason": "",
                "clip": os.path.splitext(os.path.basename(key))[0]}
               for subject, key in zip(session.subjects, session.keys)]  # fmt: skip
        prepare.assign_folds(session.name, own)
        lines += own
    prepare.write_folds(path, [session.name for session in sessions], lines)
    print(f"{path}: {sum('ilcv' in line for line in lines)} lines in folds.csv")


TAKES = {"export": ("out", "sessions"), "show": ("out", "data", "sessions"), "check": ("data", "sessions"),
         "folds": ("data",)}  # fmt: skip


def main():
    p = common.parser(__doc__)
    p.add_argument("command", choices=list(TAKES))
    p.add_argument("--data", metavar="PATH", help="processed folder (default: the synthetic stream)")
    p.add_argument("--sessions", nargs="+", choices=data.DATASETS, metavar="NAME",
                   help=f"of {', '.join(data.DATASETS)} (default: {' '.join(data.STREAM)})")  # fmt: skip
    p.add_argument("--size", type=int, default=common.TINY_SIZE, metavar="N", help="image side in pixels (default: 48)")
    p.add_argument("--out", metavar="PATH", help="export: a new or empty folder; show: a file FILE.png")
    args = p.parse_args()
    for option in ("out", "data", "sessions"):
        if getattr(args, option) is not None and option not in TAKES[args.command]:
            sys.exit(f"error: {args.command} takes no --{option}")
    needed = {"check": "command", "folds": "data"}.get(args.command, "out")
    if not getattr(args, needed):
        sys.exit(f"error: {args.command} needs --{needed}")
    if args.command == "show" and not args.out.lower().endswith(".png"):
        sys.exit(f"error: --out {args.out}: show writes a file whose name ends with .png")
    if not 8 <= args.size <= 1024:
        sys.exit(f"error: --size {args.size}: must be 8 to 1024 pixels")
    sessions = list(dict.fromkeys(args.sessions or data.STREAM))
    if args.command == "folds" and os.path.isdir(args.data):  # of all sessions that are there
        words = {name.lower().partition("_")[0] for name in os.listdir(args.data)}
        if "folds.csv" in words:
            sys.exit(f"error: {args.data}: has a folds.csv already")
        sessions = [name for name in data.DATASETS if name in words] or sessions
    if args.data is None:
        print("Synthetic stream: made-up flow images.")
        sessions = data.synthetic(args.size, sessions=sessions)
    else:
        sessions = data.load(args.data, sessions, args.size)
    if args.command == "check":
        check(sessions)
    else:
        {"export": export, "show": show, "folds": folds}[args.command](sessions, getattr(args, needed))


if __name__ == "__main__":
    common.launch(main, "the same command starts anew")
