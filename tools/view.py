"""The stream to look at: as image files, as one sheet of examples, as counts.

    python -m tools.view export --out processed                    the synthetic stream as a processed folder
    python -m tools.view show --data processed --out sheet.png     a few images of every session and emotion
    python -m tools.view check --data processed                    samples beside the official sheets' counts
    python -m tools.view folds --data processed                    write down the folds, for a folder without folds.csv
    python -m tools.view folds --data processed --against theirs   in which lines the folds.csv of two folders differ

Without --data, show and check take the synthetic stream. tools.prepare writes a folds.csv of the official sheets; that
of `folds` holds the folds that the images have had without it, which stay when an image goes.
"""

import argparse
import contextlib
import csv
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import common
import data
import protocols
from tools import prepare


@contextlib.contextmanager
def new_folder(out):
    """A folder to fill, which gets the name `out` when it is full: `out` is never half a stream."""
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or os.listdir(out)):
        sys.exit(f"error: {out}: exists already; --out takes a new or an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.{os.getpid()}.", suffix=".part", dir=out.parent) as part:
        made = Path(part, out.name)
        made.mkdir()
        yield made
        os.replace(made, out)


def export(sessions, out):
    """Write sessions as a processed folder of PNG files: data.load then reads the very same images."""
    with new_folder(out) as made:
        for session in sessions:
            for image, key in zip(session.images, session.keys):
                Path(made, key).parent.mkdir(exist_ok=True)
                Image.fromarray(image.transpose(1, 2, 0)).save(Path(made, key))
    print(f"{Path(out).absolute()}: {sum(len(session.keys) for session in sessions)} images")


def show(sessions, out):
    """One line per session; of each emotion, by name, one image of each of the first three subjects."""
    side, width, height = 56, 178, 82  # pixels: of an image, and of an emotion's three with text and margins
    sheet = Image.new("RGB", (70 + width * max(len(s.emotions) for s in sessions), height * len(sessions)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, session in enumerate(sessions):
        top = line * height + 5
        draw.text((6, top + 38), session.name, fill="black")
        for column, emotion in enumerate(session.emotions):
            left, own = 70 + column * width, np.flatnonzero(session.labels == emotion)
            draw.text((left, top), f"{emotion} ({len(own)})", fill="black")
            firsts = own[np.unique(session.subjects[own], return_index=True)[1]]
            for place, i in enumerate([*firsts, *np.setdiff1d(own, firsts)][:3]):
                image = Image.fromarray(session.images[i].transpose(1, 2, 0)).resize((side, side))
                sheet.paste(image, (left + place * side, top + 16))
    part = f"{out}.{os.getpid()}.part"
    sheet.save(part, "PNG")
    os.replace(part, out)
    print(f"{out}: {len(sessions)} sessions")


def check(sessions, path=None):
    """Print samples, subjects and emotions of each session, beside the official sheets' counts where they are known.

    Ends with one line where a run would, for the folder's folds.csv, too.
    """
    for session in sessions:
        sheet, people = data.DATASETS[session.name], data.SUBJECTS.get(session.name)
        print(f"{session.name:8s} {len(session.keys):5d} samples of {data.in_sheet(session.name) or '?':>5}"
              f"  {len(np.unique(session.subjects)):4d} subjects of {people or '?':>4}")  # fmt: skip
        plain = int(np.sum(np.ptp(session.images, (2, 3)).max(1) == 0))
        if plain:
            print(f"    {plain} images have one colour, as where the onset is the apex")
        for emotion, count in sheet.items():
            own = np.count_nonzero(session.labels == emotion)
            difference = f"   {own - count:+d}" if count not in (None, own) else ""
            print(f"    {emotion:11s} {own:5d} of {'?' if count is None else count:>5}{difference}")
    if path is not None and os.path.exists(os.path.join(path, "folds.csv")):
        for session in sessions:
            protocols.bind(session, argparse.Namespace(data=path, protocol="slcv"))


def folds(sessions, path):
    """Write folds.csv into a processed folder: a line per image, with the folds that a run gives it without."""
    lines = []
    for session in sessions:
        own = [dict(session=session.name, subject=subject, clip=Path(key).stem, onset="", key=key, reason="")
               for subject, key in zip(session.subjects.tolist(), session.keys.tolist())]  # fmt: skip
        prepare.assign_folds(session.name, own)
        lines += own
    prepare.write_folds(path, [session.name for session in sessions], lines)


def against(path, other):
    """Print the lines in which the folds.csv of two folders differ, and whether a fold does."""
    both, moved = [], 0
    for place in (path, other):
        found, file = {}, Path(place, "folds.csv")
        lines = list(csv.DictReader(file.read_text("utf-8-sig", "surrogateescape").splitlines()))
        if not lines or not set(protocols.FOLDS) <= lines[0].keys():
            sys.exit(f"error: {file}: no lines with the columns {','.join(protocols.FOLDS)}")
        for line in lines:
            entry = " ".join(line[word] for word in ("session", "subject", "clip", "onset"))
            while entry in found:  # without an onset a clip may stand there twice
                entry += " again"
            found[entry] = f"slcv {line['slcv']} ilcv {line['ilcv']}", line["key"] or "no image"
        both.append(found)
    first, second = both
    for entry in dict.fromkeys([*first, *second]):
        one, two = first.get(entry, ("no line", "")), second.get(entry, ("no line", ""))
        if one != two:
            moved += entry in first and entry in second and one[0] != two[0]
            print(f"{entry}: {' '.join(one)} | {' '.join(two)}")
    shared = len(first.keys() & second.keys()) or sys.exit(f"error: {path} and {other} have no entry in common")
    print(f"{len(first)} and {len(second)} lines; of {shared} entries in both, {moved} are in other folds")


def main():
    commands = {"export": (export, "out", "sessions"), "show": (show, "out", "data", "sessions"),
                "check": (check, "data", "sessions"), "folds": (folds, "data", "against")}  # fmt: skip
    p = common.parser(__doc__)
    p.add_argument("command", choices=list(commands))
    p.add_argument("--data", metavar="PATH", help="processed folder (default: the synthetic stream)")
    which = f"of {', '.join(data.DATASETS)} (default: {' '.join(data.STREAM)})"
    p.add_argument("--sessions", nargs="+", choices=list(data.DATASETS), metavar="NAME", help=which)
    p.add_argument("--size", type=int, default=common.TINY_SIZE, metavar="N", help="image side in pixels (default: 48)")
    p.add_argument("--against", metavar="PATH", help="folds: another processed folder, to compare with")
    p.add_argument("--out", metavar="PATH", help="export: a new or empty folder; show: a file FILE.png")
    args = p.parse_args()
    command, *takes = commands[args.command]
    path = getattr(args, takes[0])
    for option in {"out", "data", "sessions", "against"} - set(takes):
        if getattr(args, option) is not None:
            sys.exit(f"error: {args.command} takes no --{option}")
    if not path and command != check:
        sys.exit(f"error: {args.command} needs --{takes[0]}")
    if command == show and not path.lower().endswith(".png"):
        sys.exit(f"error: --out {path}: show writes a file whose name ends with .png")
    if not 8 <= args.size <= 1024:
        sys.exit(f"error: --size {args.size}: must be 8 to 1024 pixels")
    if args.data is not None and not os.path.isdir(args.data):
        sys.exit(f"error: --data {args.data!r}: no such folder")
    if args.against is not None:
        return against(args.data, args.against)
    names = list(dict.fromkeys(args.sessions or data.STREAM))
    if args.data and not args.sessions:  # of a folder all that are there
        there = [name.lower().partition("_")[0] for name in os.listdir(args.data)]
        names = [name for name in data.DATASETS if name in there] or names
    if command == folds and os.path.exists(os.path.join(path, "folds.csv")):
        sys.exit(f"error: {path}: has a folds.csv already")
    if args.data is None:
        print("Synthetic stream: made-up flow images.")
    sessions = data.synthetic(args.size, 0, names) if args.data is None else data.load(args.data, names, args.size)
    command(sessions, path)
    if command == folds:
        print(f"{path}: folds.csv is written, for {', '.join(names)}")


if __name__ == "__main__":
    common.launch(main, "the same command starts anew")
