"""Optical flow of the datasets as downloaded, written as a processed folder: what --data of every method takes.

    python -m tools.prepare --raw RAW --out OUT [--landmarks DIR] [--sessions NAME ...] [--size 256]

Each usable row of a dataset's own annotation sheet (.xlsx or .csv) gives one image: the flow from its onset to its apex
frame. RAW holds a folder per session, with the sheet and the clip folders anywhere below it, as they were unpacked:
    casme2  CASME2-coding-20140508.xlsx, CASME2_RAW_selected/sub01/EP02_01f/img46.jpg
            or Cropped/sub01/EP02_01f/reg_img46.jpg
    samm    SAMM_Micro_FACS_Codes_v2.xlsx, 006/006_1_2/006_05562.jpg
    mmew    MMEW_Micro_Exp.xlsx, Micro_Expression/happiness/S03-01-002/1.jpg or S03/happiness/S03-01-002/1.jpg
    casme3  cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx, part_A/data/spNO.1/a/color/355.jpg
            or Part_A_ME_clip/frame/spNo.1_a_355/355.jpg
    dfme    training_full_with_AU.xlsx, train_data/sub0003_01/00046.png
The sheet's labels count, never the folders' names; Table 1 says which labels stay.

--landmarks DIR crops the face. DIR holds a folder per session with NumPy files of 68 points as (x, y) in pixels of the
frames, shape (68, 2), named as in the released benchmark's landmarks.zip: casme2/sub01/EP02_01f.npy,
samm/006/006_1_2.npy, mmew/happiness/S03-01-002/S03-01-002.npy, casme3/spNO.1/a/color/color.npy (one per recording),
dfme/sub0003_01.npy. A session without a folder in DIR keeps whole frames, as mmew and casme3 do in the benchmark. Where
both raw and cropped frames are there, the raw ones are used with landmarks and the cropped ones without.

OUT gets <session>_<emotion>/sub<subject>_<clip>_onset<frame>_apex<frame>.png; report.csv, the rows left out, each with
its reason; prepare.json, what the images depend on. Images that are there already are kept: a second run makes only
what is missing, and several runs may fill one folder at once. A run with other settings is refused.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

import common
import data
import protocols


@dataclass
class Source:
    """A dataset as it is downloaded. Patterns are regular expressions for names in lower case."""

    title: str
    page: str  # where it is requested
    sheets: tuple  # names of the annotation sheet, best first; a file's name may also just contain one
    clips: str  # end of a clip folder's path, or a landmark file's; groups: clip | subject, clip | subject, clip, onset
    skipped: str = ""  # folders passed by, for frames and for landmarks
    digits: int = 3  # of the subject in the images' names
    renamed: dict = field(default_factory=dict)  # labels, beside data.ALIASES
    many: bool = False  # whether a clip is a recording of several expressions, told apart by their onset


# fmt: off
SOURCES = {  # a new dataset is one more record, beside that in data.DATASETS
    "casme2": Source("CASME II", "http://casme.psych.ac.cn/casme/e2",
                     ("CASME2-coding-20140508", "CASME2-coding-20190701", "CASME2-coding"),  # Table 1 counts the first
                     r"sub(\d+)/(ep[\w-]+)", digits=2),
    "samm": Source("SAMM", "http://www2.docm.mmu.ac.uk/STAFF/M.Yap/dataset.php",
                   ("SAMM_Micro_FACS_Codes_v2", "Micro_FACS_Codes"), r"(\d{3}_\d+_\d+)"),
    "mmew": Source("MMEW", "http://www.dpailab.com/database.html", ("MMEW_Micro_Exp",), r"(s\d+-\d+-\d+)", digits=2,
                   skipped=r"macro.*",  # macro-expressions have the same clip names
                   renamed={"repression": "others"}),  # the official page's word for what the sheet calls others
    "casme3": Source("CAS(ME)^3", "http://casme.psych.ac.cn/casme/e4",
                     ("cas(me)3_part_A_ME_label_JpgIndex_v2", "part_A_ME_label_JpgIndex"),
                     r"spno\.?(\d+)/([a-z])/color(?:/color)?|spno\.?(\d+)_([a-z])_(\d+)", many=True,
                     skipped=r"depth|(.*_)?mae(_.*)?|part_?[bc](_.*)?"),  # depth, macro-expressions, parts B and C
    "dfme": Source("DFME", "https://mea-lab-421.github.io",
                   ("training_full_with_AU", "coding"),  # the challenge's training part, that data.DATASETS counts
                   r"(sub\d+_\d+)", digits=4),
}
COLUMNS = {"subject": "subject", "filename": "clip", "onset": "onset", "apex": "apex", "offset": "offset",
           "emotion": "emotion"}  # the sheet's word, without "estimated" and "frame": ours
# fmt: on
REPORT = ["dataset", "subject", "clip", "onset", "apex", "offset", "emotion", "reason", "detail", "row"]
# The released benchmark's parameters of OpenCV's calcOpticalFlowFarneback.
FARNEBACK = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}
CHIN, BROW, NOSE_TIP, LOWER_LIP = 8, 19, 30, 57  # of the 68 landmarks, counted from 0


def main():
    p = common.parser(__doc__)
    p.add_argument("--raw", required=True, help="folder that holds the datasets as downloaded")
    p.add_argument("--out", required=True, help="folder to write: new, empty, or one to go on with")
    p.add_argument("--landmarks", metavar="DIR", help="landmarks to crop the face by (default: whole frames)")
    which = f"of {', '.join(SOURCES)} (default: {' '.join(data.STREAM)})"
    p.add_argument("--sessions", nargs="+", default=data.STREAM, choices=list(SOURCES), metavar="NAME", help=which)
    p.add_argument("--size", type=int, default=256, help="image side in pixels, 8 to 1024 (default: 256)")
    args = p.parse_args()
    args.sessions = list(dict.fromkeys(args.sessions))
    names = ", ".join(args.sessions)
    if not args.out or not 8 <= args.size <= 1024:
        sys.exit(f"error: --out {args.out!r} --size {args.size}: needed are a path, and 8 to 1024 pixels")
    for option, path in (("--raw", args.raw), ("--landmarks", args.landmarks)):
        if path is not None and not os.path.isdir(path):
            sys.exit(f"error: {option} {path!r}: no such folder; it must hold {names}; see --help")
    if args.landmarks and not any(session_folder(args.landmarks, session) for session in args.sessions):
        sys.exit(f"error: {args.landmarks}: holds none of the folders {names}; see --help for their files")
    try:
        import cv2
    except ImportError:
        sys.exit("error: prepare needs the package opencv-python-headless: pip install opencv-python-headless")

    versions = {"opencv": cv2.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    settings = {"size": args.size, "farneback": FARNEBACK, "versions": [versions], "sessions": {}}
    rows = [row for session in args.sessions for row in survey(session, args, settings["sessions"])]
    settle(args.out, settings)
    usable = [row for row in rows if not row["reason"]]
    todo = [row for row in usable if not os.path.exists(row["path"])]
    print(f"{args.out}: {len(usable) - len(todo)} images are there already, {len(todo)} to make", flush=True)
    for row in tqdm(todo, disable=None):
        row["reason"], row["detail"] = make_image(row, args.size)
    report(args.out, args.sessions, rows)


# ---- what is there ---------------------------------------------------------------------------------------------------
def survey(session, args, settings):
    """The rows of a session's sheet, with all that is known before a frame is read; fills in settings[session]."""
    source, root = SOURCES[session], session_folder(args.raw, session)
    if root is None:
        found = ", ".join(sorted(os.listdir(args.raw))[:8]) or "nothing"
        sys.exit(f"error: {args.raw}: no folder {session}, found {found}; {source.title} is requested at {source.page},"
                 " --sessions can leave it out")  # fmt: skip
    folders, files = explore(session, root)
    sheet = find_sheet(session, root, files)
    rows = read_sheet(session, sheet)
    judge(session, rows, args.out)
    place = session_folder(args.landmarks, session) if args.landmarks else None
    marks = find_landmarks(session, place) if place else {}
    kinds = {"raw": {}, "cropped": {}}
    for key, path in folders:
        kinds["cropped" if "crop" in os.path.relpath(path, root).lower() else "raw"].setdefault(key, []).append(path)
    if not folders:
        sys.exit(f"error: {root}: no clip folders of {source.title} ({source.page}); see --help for their names")
    # Cropped frames are faces already; the landmarks of the released benchmark were measured in raw frames.
    kind, other = sorted(kinds, key=lambda kind: (not kinds[kind], (kind == "raw") != bool(marks)))
    clips, twice = kinds[kind], sum(len(paths) > 1 for paths in kinds[kind].values())
    for row in rows:
        row |= {"folder": of_clip(clips, row), "crop": bool(marks), "marks": of_clip(marks, row)}
    sheet_place, crop = os.path.relpath(sheet, root), "landmarks" if marks else "whole frame"
    marks_hash = sha256([path for paths in marks.values() for path in paths]) if marks else None
    settings[session] = {"sheet": sheet_place, "sheet_sha256": sha256([sheet]), "frames": kind, "crop": crop,
                         "landmarks_sha256": marks_hash}  # fmt: skip
    print(f"{session}: {len(rows)} rows in {sheet_place}, {len(clips)} clip folders of {kind} frames"
          + f" (the {other} ones are not used)" * bool(kinds[other])
          + f" ({twice} clips are in several folders, the first is used)" * bool(twice)
          + f", {crop}", flush=True)  # fmt: skip
    return rows


def plain(text):
    """Letters and digits in lower case, so that CAS(ME)^3 equals casme3 and "Onset Frame" equals OnsetFrame."""
    return re.sub(r"[\W_]", "", str(text).lower())


def session_folder(path, session):
    """The folder in `path` that is named by a session's word or by its dataset's title, or None."""
    names = (session, plain(SOURCES[session].title))
    paths = [os.path.join(path, name) for name in sorted(os.listdir(path)) if plain(name) in names]
    return next(filter(os.path.isdir, paths), None)


def sha256(paths):
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in sorted(paths))).hexdigest()


def explore(session, root, enter_clips=False):
    """[(clip_key, path)] of the clip folders below `root`, and [path] of the files outside of them, or all; sorted.

    Hidden folders are passed by, and those that the dataset's frames and landmarks skip.
    """
    clips, files, skipped = [], [], SOURCES[session].skipped
    for folder, children, names in os.walk(root, followlinks=True):
        files += [os.path.join(folder, name) for name in names]
        seen = [name for name in children if name[0] not in "._" and not re.fullmatch(skipped, name.lower())]
        keys = {name: clip_key(session, os.path.join(folder, name)) for name in sorted(seen)}
        clips += [(key, os.path.join(folder, name)) for name, key in keys.items() if key]
        children[:] = [name for name, key in keys.items() if enter_clips or not key]  # CAS(ME)^3 has millions of frames
    return sorted(clips, key=lambda clip: clip[1]), sorted(files)


def find_landmarks(session, place):
    """{clip_key: [path]} of the landmark files below `place`."""
    marks = {}
    for path in explore(session, place, enter_clips=True)[1]:
        if path.lower().endswith(".npy") and (key := clip_key(session, path[:-4])):
            if key in marks:
                sys.exit(f"error: two landmark files for one clip, keep one: {marks[key][0]}, {path}")
            marks[key] = [path]
    return marks or sys.exit(f"error: {place}: no landmark files; see --help for how they are named")


def clip_key(session, path):
    """What a path's end tells: (clip,), (subject, clip) or (subject, clip, onset), in lower case, or None."""
    match = re.fullmatch(rf"(?:.*/)?(?:{SOURCES[session].clips})", path.lower().replace(os.sep, "/"))
    return match and tuple(int(group) if group.isdigit() else group for group in match.groups() if group)


def of_clip(index, row):
    """The first path that `index` {clip_key: paths} has for a row's clip, or None."""
    key = (row["subject"], row["clip"].lower(), row["onset"])
    return next((index[k][0] for k in (key, key[:2], key[1:2]) if k in index), None)


# ---- the annotation sheet --------------------------------------------------------------------------------------------
def find_sheet(session, root, files):
    """The path of a session's annotation sheet among the files."""
    source, ranks = SOURCES[session], {}
    tables = [path for path in files if re.fullmatch(r"[^.~].*\.(xlsx?|csv)", os.path.basename(path).lower())]
    for path in tables:
        stem, extension = os.path.splitext(os.path.basename(path).lower())
        for place, sheet in enumerate(map(plain, source.sheets)):
            if sheet in plain(stem) and extension != ".xls":  # the very name goes first, and an .xlsx before its .csv
                ranks.setdefault(path, (place, plain(stem) != sheet, extension == ".csv"))
    best = [path for path in ranks if ranks[path] == min(ranks.values())]
    if not best:
        found = ", ".join(map(os.path.basename, tables)) or "no table at all"
        sys.exit(f"error: {root}: no annotation sheet {source.sheets[0]}.xlsx or .csv (save an .xls as .xlsx),"
                 f" found {found}; {source.title} is requested at {source.page}")  # fmt: skip
    if len({sha256([path]) for path in best}) > 1:
        sys.exit(f"error: {root}: several sheets could be the right one, keep one: {', '.join(best)}")
    return best[0]


def read_sheet(session, path):
    """The rows of an annotation sheet, wherever its header and its columns stand: a list of dicts of stripped text.

    Keys: dataset; the values of COLUMNS; and row, the row's number in the sheet counted from 1.
    """
    extension, source, seen = os.path.splitext(path)[1], SOURCES[session], "no cell Subject"
    try:
        if extension.lower() == ".csv":
            lines = Path(path).read_text("utf-8-sig", errors="replace").splitlines(keepends=True)
            tables = [list(csv.reader(lines, delimiter=delimiter)) for delimiter in ",;\t"]  # one finds the columns
        else:
            import openpyxl

            warnings.filterwarnings("ignore", module="openpyxl")  # about features of Excel that it does not know
            book = openpyxl.load_workbook(path, data_only=True)
            tables = [list(table.iter_rows(values_only=True)) for table in book.worksheets]
    except ImportError:
        sys.exit(f"error: {path}: reading it needs the package openpyxl: pip install openpyxl")
    except Exception as error:  # openpyxl lets through whatever its parsers raise
        sys.exit(f"error: {path}: not a readable {extension} file ({' '.join(str(error).split())})")
    for table in tables:
        places, rows = {}, []  # places: {our word: column}
        for number, cells in enumerate(table, 1):
            cells = ["" if cell is None else str(cell).strip() for cell in cells]
            if len(places) == len(COLUMNS):
                row = {word: (cells + [""] * (i + 1))[i] for word, i in places.items()}
                rows += [{"dataset": session, **row, "row": number}] * any(row.values())
            else:  # the header is still to come; the first of two columns with one name counts
                names = [COLUMNS.get(re.sub("^estimated|frame$", "", plain(cell))) for cell in cells]
                places = {word: names.index(word) for word in names if word}
                seen = "only the columns " + ", ".join(filter(None, cells)) if "subject" in names else seen
        if len(places) == len(COLUMNS):
            return rows
    sys.exit(f"error: {path}: has {seen}; needed: Subject, Filename, Onset[Frame], Apex[Frame], Offset[Frame],"
             f" [Estimated] Emotion, as in the sheet of {source.title} ({source.page})")  # fmt: skip


def judge(session, rows, out):
    """Normalise the rows in place; add the image's path, or the reason why the sheet alone rules a row out.

    Wrong rows are never repaired: the circulating copies of the sheets do so and disagree.
    """
    source, seen = SOURCES[session], {}
    for row in rows:
        word, subject = row["emotion"].lower(), re.search(r"\d+", row["subject"])
        row["emotion"] = (data.ALIASES | source.renamed).get(word, word) or "(blank)"
        row["subject"] = int(subject.group()) if subject else row["subject"]
        frames = [re.fullmatch(r"(\d+)(\.0*)?", row[name]) for name in ("onset", "apex", "offset")]
        onset, apex, offset = (int(frame.group(1)) if frame else math.nan for frame in frames)
        key = (row["subject"], row["clip"].lower(), onset if source.many else None)
        reasons = {  # the first that holds is given
            "emotion outside Table 1": row["emotion"] not in data.DATASETS[session].emotions,
            "no subject or no file name": not subject or not row["clip"],
            "onset, apex or offset is not a number": not all(frames),
            "offset is 0": offset == 0,
            "apex outside onset..offset": not onset <= apex <= offset,
            "onset = apex": onset == apex,
            "same clip as another row": key in seen,
        }
        row["reason"] = next((reason for reason, holds in reasons.items() if holds), "")
        row["detail"] = f"row {seen[key]} is used" if row["reason"] == "same clip as another row" else ""
        if not row["reason"]:
            seen[key] = row["row"]
            row |= {"onset": onset, "apex": apex, "offset": offset}
            clip = re.sub(r"[^\w.-]", "-", row["clip"])
            name = f"sub{row['subject']:0{source.digits}d}_{clip}_onset{onset}_apex{apex}.png"
            row["path"] = os.path.join(out, f"{session}_{row['emotion']}", name)


# ---- from two frames to an image -------------------------------------------------------------------------------------
def make_image(row, size):
    """Write a row's flow image. Returns "", "" or, where there is none, the reason and its detail."""
    import cv2

    folder, files, images = row["folder"], {}, []
    if os.path.exists(row["path"]):  # another run has made it meanwhile
        return "", ""
    if folder is None:
        return "no clip folder", ""
    for name in sorted(os.listdir(folder)):
        stem, extension = os.path.splitext(name)
        numbers = re.findall(r"\d+", stem)  # the last one is the frame's, whatever its padding
        if numbers and name[0] != "." and extension.lower() in data.IMAGE_TYPES:
            files.setdefault(int(numbers[-1]), []).append(os.path.join(folder, name))
    for name in ("onset", "apex"):
        found = files.get(row[name], [])
        if len(found) != 1:
            return f"{name} frame {'found twice' if found else 'missing'}", f"frame {row[name]} in {folder}"
        try:
            images.append(Image.open(found[0]).convert("L"))
        except Exception:  # a damaged file can raise almost anything
            return f"{name} frame cannot be decoded", found[0]
    if images[0].size != images[1].size:
        return "onset and apex frame differ in size", folder
    if row["crop"] and not row["marks"]:
        return "no landmarks", ""
    if row["crop"]:
        try:
            box = crop_box(np.asarray(np.load(row["marks"])), *images[0].size)
        except Exception as error:  # and so can this one
            return "landmarks cannot be used", " ".join(str(error).split())
        images = [image.crop(box) for image in images]
    # Flow at the frames' own resolution, as in the released benchmark: a stretched frame would change its directions.
    onset, apex = map(np.asarray, images)
    if np.array_equal(onset, apex):
        return "onset and apex frame are the same", folder
    flow = cv2.calcOpticalFlowFarneback(onset, apex, None, **FARNEBACK)  # (H, W, 2), x to the right, y down
    coded, png = Image.fromarray(data.flow_to_image(flow[None])[0].transpose(1, 2, 0)), io.BytesIO()
    coded.resize((size, size), Image.Resampling.BILINEAR).save(png, "PNG")
    os.makedirs(os.path.dirname(row["path"]), exist_ok=True)
    protocols.write(row["path"], png.getvalue())
    return "", ""


def crop_box(points, width, height):
    """The face in a frame of width x height pixels: (left, top, right, bottom), cut off at the frame's edges.

    points: 68 landmarks (68, 2) as (x, y) in pixels. The box is a square around the tip of the nose. Its side is the
    released benchmark's: the height from brow to chin plus that from lower lip to chin. (The benchmark reads the centre
    as (y, x), which moves the crop off the face.) ValueError if the points cannot belong to the frame.
    """
    if points.shape != (68, 2) or not np.isfinite(points).all():
        raise ValueError(f"shape {points.shape} or values, needed (68, 2) and finite")
    # A chin may lie a little below the frame; points measured in other frames lie far outside.
    if (abs(points / (width, height) - 0.5) > 0.6).any():
        raise ValueError(f"points lie outside of the frame of {width} x {height} pixels")
    x, y = points[NOSE_TIP]
    half = (2 * points[CHIN, 1] - points[BROW, 1] - points[LOWER_LIP, 1]) / 2
    left, right = max(0, math.floor(x - half)), min(width, math.floor(x + half))
    top, bottom = max(0, math.floor(y - half)), min(height, math.floor(y + half))
    if right <= left or bottom <= top:
        raise ValueError("the chin is not below the brow and the lip")
    return left, top, right, bottom


# ---- the two files that tell of all sessions -------------------------------------------------------------------------
def lock(out):
    """An open file: until it is closed, no other run rewrites the two files."""
    file = open(os.path.join(out, ".lock"), "w")
    with contextlib.suppress(ImportError, OSError):  # Windows and some network drives have no such lock
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def settle(out, settings):
    """Write prepare.json, or refuse a folder that was made otherwise: its images would not go with the new ones."""
    os.makedirs(out, exist_ok=True)
    path, names = os.path.join(out, "prepare.json"), os.listdir(out)
    if "prepare.json" not in names and not all(name[0] == "." or name.endswith(".part") for name in names):
        sys.exit(f"error: {out}: not a folder that prepare made; --out takes a new or empty one, or one to go on with")
    with lock(out):
        read_report(out)  # if it cannot be read, now is the time to say so
        pairs = []  # name, value in OUT, value now
        if os.path.exists(path):
            try:
                old = json.loads(Path(path).read_text("utf-8"))
                pairs += [(name, old[name], settings[name]) for name in ("size", "farneback")]
                for session, now in settings["sessions"].items():
                    before = old["sessions"].get(session, now)
                    pairs += [(f"{session} {name}", before[name], now[name]) for name in now if name != "sheet"]
                settings["sessions"] = old["sessions"] | settings["sessions"]
                settings["versions"] = old["versions"] + [v for v in settings["versions"] if v not in old["versions"]]
            except (ValueError, KeyError, TypeError, AttributeError):
                sys.exit(f"error: {path}: not readable as what prepare writes; use another --out")
        for name, before, now in pairs:
            if before != now:
                sys.exit(f"error: {out}: was made with {name} {before}, this is {now}; use another --out")
        protocols.write(path, json.dumps(settings, indent=1).encode())


def read_report(out):
    """The rows of OUT's report.csv, dicts; none if there is none."""
    path = os.path.join(out, "report.csv")
    try:
        reader = csv.DictReader(io.StringIO(Path(path).read_bytes().decode(), newline=""))
        if reader.fieldnames != REPORT:
            raise ValueError("other columns")
        return list(reader)
    except FileNotFoundError:
        return []
    except (ValueError, csv.Error) as error:
        sys.exit(f"error: {path}: not readable as what prepare writes ({error}); delete it and run again")


def report(out, sessions, rows):
    """Write report.csv (rows of other sessions in it stay), and print counts per emotion and per reason."""
    path, text = os.path.join(out, "report.csv"), io.StringIO(newline="")
    dropped = [row for row in rows if row["reason"]]
    with lock(out):
        writer = csv.DictWriter(text, REPORT, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([row for row in read_report(out) if row["dataset"] not in sessions] + dropped)
        protocols.write(path, text.getvalue().encode())
    print(f"{'session':8s} {'emotion':12s} {'sheet':>7s} {'Table 1':>7s} {'usable':>7s}")
    for session in sessions:
        listed = list(data.DATASETS[session].emotions)
        sheet = Counter(row["emotion"] for row in rows if row["dataset"] == session)
        usable = Counter(row["emotion"] for row in rows if row["dataset"] == session and not row["reason"])
        words = listed + sorted(set(sheet) - set(listed))
        counts = {word: (sheet[word], sheet[word] * (word in listed), usable[word]) for word in words}
        for word, numbers in [*counts.items(), ("all", [sum(column) for column in zip(*counts.values())])]:
            print(f"{session:8s} {word:12s}" + "".join(f" {number:7d}" for number in numbers))
    for (session, reason), count in sorted(Counter((row["dataset"], row["reason"]) for row in dropped).items()):
        print(f"left out: {count:5d} rows of {session}: {reason}")
    print(f"{path}: the {len(dropped)} rows that were left out, each with its reason")


if __name__ == "__main__":
    common.launch(main, kept="the images that are made are kept, the same command goes on from there")
