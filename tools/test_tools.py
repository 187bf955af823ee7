"""The tests of tools/ and of tiny/pretrain.py: prepare, report, view, tables, pretrain, and what docs/ says."""

import concurrent.futures
import contextlib
import csv
import functools
import importlib
import io
import itertools
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import cv2
import numpy as np
import openpyxl
import pytest
import torch
from openpyxl.styles import Font
from PIL import Image

import common
import data
import protocols
from tiny import pretrain
from tools import bench, prepare, report, tables, view

HERE = Path(__file__).resolve().parent.parent

# ---- prepare: raw trees in every layout, naming and oddity of the official downloads ---------------------------------
# A frame is texture, 200 x 160 pixels. From onset to apex all of it moves in one direction, and most around BUMP. Each
# entry has its own direction: an image's hue tells whether it was made of the right frames, and its brightest place how
# they were cropped. What must not be used moves the other way.
BUMP, NOSE, SIDE = (125, 65), {1: (150, 85), 0: (100, 85)}, 90  # landmarks: nose of odd and even subjects; crop's side
# fmt: off
HEADERS = {
    "casme2": "Subject|Filename||OnsetFrame|ApexFrame|OffsetFrame||Action Units|Estimated Emotion",
    "samm": "Subject|Filename|Inducement Code|Onset Frame|Apex Frame|Offset Frame|Duration|Micro|Estimated Emotion",
    "mmew": "Subject|Filename|OnsetFrame|ApexFrame|OffsetFrame|Action Units|Estimated Emotion|remarks",
    "casme3": "Subject|Filename|Onset|Apex|Offset|AU|Objective class|emotion",
    "dfme": "Subject|Filename|OnsetFrame|ApexFrame|OffsetFrame|Emotion|EmotionId|Fps|AU"}
SHEETS = {"casme2": "CASME II/CASME2-coding-20140508.xlsx", "samm": "SAMM/SAMM_Micro_FACS_Codes_v2.xlsx",
          "mmew": "mmew/MMEW_Micro_Exp (20).xlsx", "dfme": "dfme/full_release_annotation/training_full_with_AU.xlsx",
          "casme3": "CAS(ME)^3/annotation/partA/cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx"}
MMEW, CLIPS = "Micro_and_Macro_Expression_Warehouse/MMEW_Final/", "Part_A_ME_clip/Part_A_ME_clip/"
MACRO, MAE = MMEW + "Macro_Expression/{e}/{c}/{n}.jpg", "Part_A_MaE_clip/frame/spNo.{s}_{c}_{o}/{n}.jpg"
COLOR, CODE = "part_A/data/part1/spNO.{s}/{c}/color/{n}.jpg", "part_A/{e}/spNO.{s}k{a}/{n}.jpg"
LAYOUT = {  # frames and landmarks of subject s, clip c, emotion e, onset o, apex a, frame n
    "casme2": ("CASME2_RAW_selected/CASME2_RAW_selected/sub{s:02d}/{c}/img{n}.jpg", "sub{s:02d}/{c}.npy"),
    "samm": ("SAMM/{s:03d}/{c}/{s:03d}_{n:05d}.jpg", "{s:03d}/{c}.npy"),
    "mmew": (MMEW + "Micro_Expression/{e}/{c}/{n}.jpg", "{e}/{c}/{c}.npy"),
    "casme3": (CLIPS + "frame/spNo.{s}_{c}_{o}/{n}.jpg", "spNO.{s}/{c}/color/color.npy"),
    "dfme": ("train_data/train_data/{c}/{n:05d}.png", "{c}.npy")}
DECOYS = {"mmew": [MACRO], "casme3": [CLIPS + "depth/spNo.{s}_{c}_{o}/{n}.png", MAE,  # frames that must not be used
                                      "part_C/data/spNO.{s}/{c}/color/{n}.jpg"]}
LABEL, NUMBER, NAME = "emotion outside Table 1", "onset or apex is not a number", "no subject or no file name"
TWICE, ORDER, FOLDER, CUT = "same clip as another entry", "apex before onset", "no clip folder", "onset frame missing"
DAMAGES = ("apex frame missing", "onset frame cannot be decoded", "apex frame cannot be decoded",
           "onset frame found twice", "onset and apex frame are the same", "onset and apex frame differ in size")
ENTRIES = {  # subject, clip, onset, apex, label, image or reason; frames, if not as above, None if there are none
    "casme2": [
        ("01", "EP02_01f", 46, 59, "happiness", "happiness/sub01"), ("24", "EP1", 1, 2, "sadness", LABEL),
        ("01", "EP03_02", "131.0", 161, "disgust", "disgust/sub01", "CASME2-RAW/Sub01/ep03_02/img{n}.JPG"),
        ("02", "EP03_02", 10, 14, "others", "others/sub02", "CASME2_RAW/CASME2-RAW/sub02/{c}/img{n}.jpeg"),
        (3, "EP06_02_01", 99.0, 101, "repression", "repression/sub03", "sub03/{c}/{n:05d}.bmp"), (None,) * 7,
        ("26", "EP01_2", "7", " 9 ", " Surprise ", "surprise/sub26"), ("23", "EP01_09", 4, 9, None, LABEL),
        ("04", "EP12_01f", 1, "/", "disgust", NUMBER, None), ("05", "EP09_05f", 9, 9, "disgust", "onset = apex"),
        ("01", "EP02_01f", 47, 59, "disgust", TWICE, None), ("05", "EP1", 5, 9, "others", "others/sub05"),
        ("22", None, 4, 9, "others", NAME, None), ("?", "EP01_01", 4, 9, "others", NAME, None),
        ("18", "EP08_01", 4, 9, "others", FOLDER, None),
        *[("17", f"EP05_{i}", 4, 9, "others", reason) for i, reason in enumerate(DAMAGES)]],
    "samm": [
        ("006", "006_1_2", 5562, 5567, "Anger", "anger/sub006"), ("032", "032_3_2", 26, 27, "Anger", "anger/sub032"),
        ("013", "013_1_8", 562, 570, "Other", "others/sub013", "SAMM/013/013_1_8/013_{n:04d}.jpg"),
        ("011", "011_4_2", 4, 9, "Contempt", "contempt/sub011"), ("028", "028_4_1", 9, 43, "Anger", DAMAGES[0])],
    "mmew": [  # the second one's folder is stale
        (3, "S03-01-002", 1, 5, "happiness", "happiness/sub03"), (5, "S05-04-001", 1, 5, "others", FOLDER, MACRO),
        (4, "S04-02-001", 2, 8, "surprise", "surprise/sub04", MMEW + "Micro_Expression/disgust/{c}/{n}.jpg"),
        ("S13", "S13-04-001", 1, 10, "repression", "others/sub13", MMEW + "S13/{e}/{c}/{n}.jpg"),
        (30, "S30-06-001", 1, 3, "sadness", "sad/sub30", MMEW + "S30/{e}/{c}/{n}.jpg")],
    "casme3": [
        ("spNO.1", "a", "355", "360", "happy", "happiness/sub001"), ("spNO.1", "a", "400", "405", "sad", "sad/sub001"),
        ("spNO.1", "a", "355", "361", "happy", TWICE, None), ("spNO.1", "B", "900", "905", "sad", FOLDER, MAE),
        ("spNO.12", "J", "5", "9", "Others", "others/sub012", COLOR), ("spNO.4", "e", "1", "2", "sad", "sad/sub004"),
        ("spNO.12", "J", "50", "59", "anger", "anger/sub012", COLOR), ("spNO.149", "d", "112", "83", "sad", ORDER),
        ("spNO.12", "J", None, "85", "sad", NUMBER, None), ("spNO.12", "J", "500", "505", "fear", "fear/sub012"),
        ("spNO.12", "J", "80", "85", "sad", CUT, None), ("spNO.8", "K", 3, 7, "fear", "fear/sub008", CODE),
        ("spNO.7", "K", 31, 37, "sad", "sad/sub007", CODE)],
    "dfme": [
        ("sub0003", "sub0003_01", 46, 60, "happiness", "happiness/sub0003"),
        ("sub0003", "sub0003_02", 0, 5, "sadness", "sad/sub0003", "train_data/{c}/{n:05d}.PNG"),
        ("sub0650", "sub0650_11", 3, 5, "contempt", "contempt/sub0650", "USTC_partB/micro/fear/{c}/{n:05d}.png"),
        *[(f"sub{s}", f"sub{s}_01", 3, 5, "anger", FOLDER, None) for s in (1000, 1001, 1002)]]}
OUTSIDE = "needed are (68, 2), inside of the frame of 200 x 160 pixels"
BAD_MARKS = {  # clip: what its landmark file holds instead, None being no file; a part of its reason and detail
    "006_1_2": (None, "no landmarks"), "013_1_8": (np.ones((98, 2)), f"cannot be used: points (98, 2), {OUTSIDE}"),
    "032_3_2": (np.full((68, 2), 180.0), OUTSIDE), "EP1": (np.full((68, 2), np.nan), OUTSIDE),
    "EP01_2": (np.full((68, 2), 0.5), "the chin is not below"), "sub0003_02": (b"PK\x03\x04", "cannot be used: ")}
# fmt: on


def number(text):
    """A subject or a frame of the sheet as a number, where it is one."""
    digits = re.search(r"\d+", str(text))
    return int(digits.group()) if digits else text


ALL = [(session, *entry) for session, entries in ENTRIES.items() for entry in entries]
EXPECTED = {f"{e[0]}_{e[6]}_{e[2]}_onset{number(e[3])}_apex{number(e[4])}.png": e for e in ALL if "/" in str(e[6])}
DROPPED = [(e[0], str(number(e[1])), e[2] or "", e[6]) for e in ALL if "/" not in (e[6] or "/")]
ANGLES = {entry: 37 * i for i, entry in enumerate(ALL)}
TINY = next(iter(EXPECTED))
TEXTURE = np.clip(128 + 400 * (cv2.GaussianBlur(np.random.RandomState(0).rand(160, 200), (0, 0), 2) - 0.5), 0, 255)


@functools.cache
def moved(angle):
    """The frame after a motion of 1 pixel towards `angle`, of 4 pixels at BUMP."""
    y, x = np.mgrid[:160, :200]
    size = 1 + 3 * np.exp(-((x - BUMP[0]) ** 2 + (y - BUMP[1]) ** 2) / (2 * 12**2))
    x, y = x - size * np.cos(np.radians(angle)), y - size * np.sin(np.radians(angle))
    return cv2.remap(TEXTURE, np.float32(x), np.float32(y), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def save(path, content):
    """Write bytes, landmarks or an image."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(content, bytes):
        Path(path).write_bytes(content)
    elif path.endswith(".npy"):
        np.save(path, content)
    else:
        Image.fromarray(content.clip(0, 255).astype(np.uint8)).save(path, quality=95)


def clip(pattern, onset, apex, angle, **names):
    """Frames onset, apex and the one after it, and beside them what is no frame."""
    for n, image in ((onset, TEXTURE), (apex, moved(angle)), (apex + 1, moved(angle + 180))):
        folder, name = os.path.split(pattern.format(n=n, **names))
        save(f"{folder}/{name}", moved(angle + 180))
        for no_frame in (f"._{name}", f"{name}.{n}.part"):  # of macOS; of a program that was killed
            shutil.copy(f"{folder}/{name}", f"{folder}/{no_frame}")
        save(f"{folder}/{name}", image)


def book(path, entries):
    """Write a session's sheet for some of ALL, offset always 0, and a second worksheet that is large and empty."""
    session, workbook = entries[0][0], openpyxl.Workbook()
    header = HEADERS[session].split("|")
    for line in 13 * (session == "samm") * [["a note: see Subject"]] + [header]:
        workbook.active.append(line)
    for _, subject, name, onset, apex, emotion, *_ in entries:
        cells = dict(subject=subject, filename=name, onset=onset, apex=apex, offset=0, emotion=emotion)
        words = [re.sub("estimated|frame| ", "", word.lower()) for word in header]
        workbook.active.append([cells.get(word, "=SUM(F2-D2)+1") if subject else None for word in words])
    workbook.create_sheet("Sheet2").cell(434, 17).font = Font(bold=True)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    workbook.save(path)


def landmarks(x, y, side):
    """68 points (x, y) around the tip of the nose, for which the crop is a square of the given side."""
    points = np.full((68, 2), (x, y), float)
    points[[8, 19, 57], 1] += np.array([28, -16, 8]) * side / 64  # chin, brow, lower lip: twice 28 + 16 - 8 are 64
    return points


def make_tree(raw, marks):
    """All five datasets as they were downloaded, and landmarks for them."""
    homes = {session: f"{raw}/{sheet.split('/')[0]}" for session, sheet in SHEETS.items()}
    for entry, angle in ANGLES.items():
        session, subject, name, onset, apex, label, gives, *frames = entry
        names, (right, points) = dict(s=number(subject), c=name, e=label, o=onset, a=apex), LAYOUT[session]
        if frames != [None]:
            clip(f"{homes[session]}/{(frames or [right])[0]}", number(onset), number(apex), angle, **names)
        if entry not in EXPECTED.values():
            continue
        for decoy in (f"__MACOSX/{right}", *DECOYS.get(session, [])):
            clip(f"{homes[session]}/{decoy}", number(onset), number(apex), angle + 180, **names)
        content = BAD_MARKS.get(name, [landmarks(*NOSE[names["s"] % 2], SIDE)])[0]
        if content is not None:
            save(f"{marks}/{session}/{points.format(**names)}", content)
    for decoy in ("mmew/Macro_Expression/happiness/S03-01-002.npy", "casme3/part_C/spNO.1/a/color/color.npy"):
        save(f"{marks}/{decoy}", landmarks(60, 80, 60))
    for session, sheet in SHEETS.items():
        book(f"{raw}/{sheet}", [entry for entry in ALL if entry[0] == session])
    os.remove(f"{homes['samm']}/SAMM/028/028_4_1/028_00043.jpg")
    place = f"{homes['casme2']}/CASME2_RAW_selected/CASME2_RAW_selected/sub17/EP05_"
    os.remove(f"{place}0/img9.jpg")
    os.truncate(f"{place}2/img9.jpg", 1500)
    for name, content in {"1/img4": b"", "3/img004": TEXTURE, "4/img9": TEXTURE, "5/img9": TEXTURE[:90]}.items():
        save(f"{place}{name}.jpg", content)


def here(*words, main=prepare.main):
    """main() in this process: what it printed, or the one line "error: ..." that it ended with."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["a tool", *map(str, words)])
        try:
            common.launch(main)
        except SystemExit as stop:
            return str(stop.code or out.getvalue())
    return out.getvalue()


def refused(words, *parts):
    """A user's mistake: one line that has all of the parts."""
    line = here(*words)
    assert re.fullmatch("error: .*", line) and all(str(part) in line for part in parts), (parts, line)


def images(out):
    """{path below OUT: time of writing} of the images there; each is read to its end."""
    paths = list(Path(out).glob("*/*.png"))
    assert all(Image.open(path).size == (64, 64) and Image.open(path).load() for path in paths)
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in paths}


def table(out, name, *columns):
    """The lines of folds.csv or report.csv: dicts, or tuples of some columns."""
    lines = list(csv.DictReader(Path(out, name).read_text("utf-8").splitlines()))
    return [tuple(line[column] for column in columns) for line in lines] if columns else lines


def shows(path, angle, place=(125 / 200, 65 / 160), tolerance=0.06):
    """Whether an image shows motion in the direction `angle`, most of it at `place` (x, y), from 0 to 1."""
    hue, _, value = np.asarray(Image.open(path).convert("HSV"), np.float32).transpose(2, 0, 1)
    mean = np.degrees(np.angle((value**2 * np.exp(2j * np.pi * hue / 255)).sum()))
    value = cv2.GaussianBlur(value, (0, 0), len(value) / 16)[5:-5, 5:-5]
    found = (np.array(np.unravel_index(value.argmax(), value.shape))[::-1] + 5.5) / (len(value) + 10)
    return abs((mean - angle + 180) % 360 - 180) < 4 and abs(found - place).max() < tolerance


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """All five datasets, prepared by one command: the folder, the command's words, what it printed."""
    root = tmp_path_factory.mktemp("prepare")
    make_tree(f"{root}/raw", f"{root}/marks")
    words = ["--raw", f"{root}/raw", "--out", f"{root}/out", "--size", 64, "--sessions", *HEADERS]
    return root, words, here(*words)


# ---- prepare: what is written, what is left out, folds ---------------------------------------------------------------
def test_every_usable_entry_gives_an_image_of_its_own_frames_and_every_other_a_reason(prepared):
    root, _, screen = prepared
    out = root / "out"
    assert set(images(out)) == set(EXPECTED), screen
    assert [key for key, entry in EXPECTED.items() if not shows(out / key, ANGLES[entry])] == []
    assert not any(".jpg" in path for path in prepare.explore("samm", f"{root}/raw/SAMM")[1])  # clips are not entered
    assert table(out, "report.csv", "session", "subject", "clip", "reason") == DROPPED
    details = table(out, "report.csv", "row", "clip", "detail")
    assert ("9", "d", "") in details and ("12", "EP02_01f", "line 2 of the sheet is used") in details
    assert re.fullmatch("frame 43 in .*SAMM/028/028_4_1", dict(line[1:] for line in details)["028_4_1"])
    assert "left out:     1 entries of samm: apex frame missing\n" in screen
    assert re.findall("warning: (.*): its raw frames stay whole", screen) == ["casme2", "samm", "dfme"]
    assert {  # entries of the sheet, of Table 1, usable, expected; words as they are after normalising
        "casme2 others 11 11 2", "casme2 (blank) 1 0 0", "casme2 sad 1 0 0", "casme2 all 20 18 6 244",
        "samm all 5 5 4 134", "mmew all 5 5 4 292", "casme3 all 13 13 8 801", "dfme all 6 6 3 1856",
    } <= {" ".join(line.split()) for line in screen.splitlines()}  # fmt: skip


def test_folds_belong_to_the_sheet(prepared):
    """To all entries with a subject, a clip and an emotion of Table 1, with an image or not, ordered as numbers."""
    everything = table(prepared[0] / "out", "folds.csv")
    assert {line["key"] for line in everything} == {"", *EXPECTED} and len(everything) == 16 + 5 + 5 + 13 + 6
    lines = [line for line in everything if line["session"] == "casme3"]
    words = ["{subject} {clip} {onset} {slcv}".format(**line) + "*" * bool(line["key"]) for line in lines]
    assert words == ["1 a 355 0*", "1 a 355 0", "1 a 400 0*", "1 b 900 0", "4 e 1 1*", "7 k 31 2*", "8 k 3 3*",
                     "12 j 5 4*", "12 j 50 4*", "12 j 80 4", "12 j 500 4*", "12 j  4", "149 d 112 0"]  # fmt: skip
    for fold, test in enumerate(protocols.split(range(13), "ilcv")):
        assert all(lines[i]["ilcv"] == str(fold) for i in test)


def test_second_run_makes_only_what_is_missing_and_with_other_settings_nothing(prepared):
    root, words, screen = prepared
    out, settings, samm = root / "out", root / "out" / "prepare.json", root / "raw" / "SAMM"
    key = "samm_anger/sub006_006_1_2_onset5562_apex5567.png"
    before, kept, tables = images(out), settings.read_text(), [table(out, "report.csv"), table(out, "folds.csv")]
    os.renames(samm / "SAMM_Micro_FACS_Codes_v2.xlsx", samm / "a" / "SAMM_Micro_FACS_Codes_v2.xlsx")
    os.renames(samm / "SAMM" / "011", root / "011")  # its image is there
    assert f"{len(EXPECTED)} images are there already, 14 to make" in here(*words, "samm")  # named twice
    os.renames(root / "011", samm / "SAMM" / "011")
    assert images(out) == before and [table(out, "report.csv"), table(out, "folds.csv")] == tables
    assert f"casme3: 13 entries in {SHEETS['casme3'].partition('/')[2]}, " in screen
    for old, new, part in (("64", "32", "size 32, this is 64"), ('e": 15', 'e": 21', "farneback"),
                           ("whole frame", "landmarks", "casme2 crop landmarks"),
                           ('"raw"', '"cropped"', "frames"), ('sha256": "', 'sha256": "0', "sheet_sha")):  # fmt: skip
        settings.write_text(kept.replace(old, new))
        refused([*words, "--sessions", "casme2"], out, part, "another --out")
    settings.write_text(kept.replace(cv2.__version__, "0"))
    for name, content in (("report.csv", "session,subject".encode("utf-16")), ("folds.csv", b"session;subject\n")):
        (out / name).write_bytes(content)  # saved by another program
        (out / key).unlink(missing_ok=True)
        refused(words, name, "delete it and run again")
        assert not (out / key).exists()  # it ends before the work, not after it
        os.remove(out / name)
    here(*words)
    assert images(out).keys() == before.keys() and [table(out, "report.csv"), table(out, "folds.csv")] == tables
    record = json.loads(settings.read_text())
    assert [versions["opencv"] for versions in record["versions"]] == ["0", cv2.__version__]
    assert list(record["sessions"]) == list(HEADERS) and record["sessions"]["samm"]["sheet"].startswith("a" + os.sep)


def test_landmarks_crop_both_frames_at_the_nose(prepared):
    assert prepare.crop_box(landmarks(20, 145, 60), 200, 160) == [0, 115, 50, 160]  # cut off at the edges
    root, words, _ = prepared
    os.makedirs(f"{root}/z")
    os.symlink(f"{root}/marks", f"{root}/z/landmarks")  # as it may be unpacked
    out, crop = f"{root}/cropped", ["--crop", "mmew", "casme3", "--flow"]
    words = [*words, "--out", out, f"--landmarks={root}/z"]
    here(*words, *crop)
    usable = {key: entry for key, entry in EXPECTED.items() if entry[2] not in BAD_MARKS}
    assert set(images(out)) == set(usable)
    for key, entry in usable.items():
        place = np.subtract(BUMP, NOSE[number(entry[1]) % 2]) / SIDE + 0.5
        assert shows(f"{out}/{key}", ANGLES[entry], place, 0.12), key
        flow = np.load(f"{out}/.flow/{key[:-4]}.npy")  # as OpenCV gave it, before it was coded and resized
        assert flow.dtype == np.float32 and flow.shape == (SIDE, SIDE, 2) and 3 < np.hypot(*flow.T).max() < 5, key
        coded = Image.fromarray(data.flow_to_image(flow[None])[0].transpose(1, 2, 0)).resize((64, 64), 2)  # bilinear
        assert np.array_equal(np.asarray(coded), np.asarray(Image.open(f"{out}/{key}")))
    why = {clip: f"{reason}: {detail}" for clip, reason, detail in table(out, "report.csv", "clip", "reason", "detail")}
    assert all(part in why[name] for name, (_, part) in BAD_MARKS.items()), why
    refused([*words, *crop[:-1]], "flow True", "another --out")
    save(f"{root}/marks/samm/011/011_4_2.npy", landmarks(120, 60, 60))
    refused([*words, *crop], "samm landmarks_sha256", "another --out")
    save(f"{root}/others/samm/099_1_1.npy", landmarks(120, 60, 60))
    refused([*words, f"--landmarks={root}/others", "--sessions=samm"], "no usable entry", "found", "/099_1_1.npy")
    save(f"{root}/marks/mmew/S03-01-002.npy", landmarks(120, 60, 60))
    refused([*words, *crop, "--out", f"{root}/new"], "two landmark files", "/mmew/S03-01-002.npy",
            "/mmew/happiness/S03-01-002/S03-01-002.npy")  # fmt: skip
    # Sessions that the benchmark takes whole stay whole, though there are landmarks.
    shutil.rmtree(f"{root}/marks/dfme")
    screen = here(*words, "--out", f"{root}/whole", "--whole", "samm", "--sessions", *list(HEADERS)[1:])
    assert screen.count("folders), whole frame") == 4 and re.findall("warning: (.*): its", screen) == ["dfme"]
    assert all(shows(f"{root}/whole/{key}", ANGLES[EXPECTED[key]]) for key in EXPECTED if "casme2" not in key)
    for more in (["--crop", "dfme"], ["--crop", "samm", "--whole", "samm"], ["--whole", "casme2", "--sessions=samm"]):
        refused([*words, *more], f"--crop or --whole {more[1]}")
    assert not os.path.exists(f"{root}/new") and not os.path.exists(f"{root}/whole/.flow")


def test_cropped_frames_are_preferred_without_landmarks_and_raw_frames_with(tmp_path, monkeypatch):
    raw, words = f"{tmp_path}/raw/casme2", ["--raw", f"{tmp_path}/raw", "--sessions", "casme2", "--size", 64]
    book(f"{raw}/CASME2-coding-20140508.xlsx", ALL[:1])
    clip(f"{raw}/Cropped-updated/Cropped/sub01/EP02_01f/reg_img{{n}}.jpg", 46, 59, 60)
    clip(f"{raw}/CASME2-RAW/sub01/EP02_01f/img{{n}}.jpg", 46, 59, 240)
    clip(f"{tmp_path}/elsewhere/Cropped/sub01/EP02_01f/reg_img{{n}}.jpg", 46, 59, 90)
    os.symlink(tmp_path / "elsewhere", f"{raw}/a")
    save(f"{tmp_path}/marks/casme2/sub01/EP02_01f.npy", landmarks(*BUMP, 90))
    out, raw_out = ["--out", tmp_path / "out"], tmp_path / "raw frames"
    screen = here(*words, *out)
    assert "1 clips of cropped frames (1 raw and 1 cropped in 3 folders), whole frame" in screen
    assert shows(f"{tmp_path}/out/{TINY}", 60)  # of Cropped-updated, before a in order
    assert "warning" not in screen and "folds.csv gets no lines of casme2: 1 subjects are too few" in screen
    out += ["--landmarks", tmp_path / "marks"]
    screen = here(*words[:4], *out, "--out", raw_out)
    assert "1 clips of raw frames (1 raw and 1 cropped in 3 folders), landmarks" in screen
    assert shows(raw_out / TINY, 240, (0.5, 0.5), 0.12) and Image.open(raw_out / TINY).size == (256, 256)  # the default
    shutil.rmtree(f"{raw}/CASME2-RAW")
    assert "1 clips of cropped frames (0 raw and 1 cropped in 2 folders), whole frame" in here(*words, *out)
    refused([*words, *out, "--crop", "casme2"], "casme2 crop whole frame, this is landmarks")
    monkeypatch.setattr(data, "flow_to_image", lambda flow: np.zeros((1, 3, 8, 8), np.uint8))
    refused([*words, *out], "coding", "another --out")


def test_view_writes_down_the_folds_that_a_folder_has_had(prepared, tmp_path):
    out = shutil.copytree(prepared[0] / "out", tmp_path / "out")
    assert "has a folds.csv already" in here("folds", "--data", out, main=view.main)
    (out / "folds.csv").unlink()
    before = {session.name: session for session in data.load(str(out), list(HEADERS), 8)}
    screen = here("folds", "--data", out, main=view.main)
    assert re.findall(r"no lines of (\w+): \d subjects are too few", screen) == ["samm", "mmew", "dfme"]
    lines = {line["key"]: line for line in table(out, "folds.csv")}
    assert len(lines) == len(before["casme2"].keys) + len(before["casme3"].keys)
    line = dict(session="casme3", subject="12", clip="sub012_j_onset5_apex9", onset="")
    assert line.items() < lines["casme3_others/sub012_J_onset5_apex9.png"].items()
    for name, protocol in itertools.product(("casme2", "casme3"), ("slcv", "ilcv")):
        for fold, test in enumerate(protocols.split(before[name].subjects, protocol)):
            assert {lines[key][protocol] for key in before[name].keys[test]} == {str(fold)}


# ---- prepare: annotation sheets --------------------------------------------------------------------------------------
@pytest.mark.parametrize("session, names, error", [  # without an error the first one is the right one
    ("casme2", "copy/CASME2-coding-20140508.xlsx|CASME2-coding-20140508.csv", ""),  # the .xlsx is the original
    ("casme2", "CASME2-coding-20140508.csv|CASME2-coding-20190701.xlsx", ""),
    ("casme2", "CASME2.xlsx|CASME2-ObjectiveClasses.xlsx|~$CASME2.xlsx", ""), ("samm", "SAMM.xlsx|._SAMM.xlsx", ""),
    ("casme3", "cas(me)3_part_A_ME_label_JpgIndex_v1.xlsx|cas(me)3_part_A_MaE_label_JpgIndex_v2.xlsx", ""),
    ("casme3", "casme3_table.xlsx|casme3_MaE.xlsx", ""), ("mmew", "MMEW_Micro_Exp (20).xlsx|MMEW.xlsx", ""),
    ("mmew", "MMEW_Micro_Exp.csv|MMEW_Micro_Exp_new.xlsx", ""), ("mmew", "a/MMEW.xlsx|b/MMEW.xlsx", ""),  # equal bytes
    ("dfme", "coding.xlsx|test_coding.txt|testA_full_with_AU.xlsx", ""),
    ("casme2", "a.txt", "no annotation sheet CASME2-coding-20140508.xlsx or .csv .*no table at all; CASME II .*/e2"),
    ("casme2", "CASME2-ObjectiveClasses.xlsx|CASME2-coding-20140508.xls", "no .*found CASME2-O.*-coding-20140508.xls;"),
    ("mmew", "MMEW_Micro_Exp (1).xlsx|MMEW_Micro_Exp (2).xlsx", r"several sheets .*\(1\).*\(2\)"),
])  # fmt: skip
def test_the_right_one_of_several_sheets(tmp_path, session, names, error):
    paths = [f"{tmp_path}/{name}" for name in names.split("|")]
    for path in paths:
        save(path, os.path.basename(path).encode())
    try:
        assert prepare.find_sheet(session, "RAW", sorted(paths)) == paths[0] and not error
    except SystemExit as stop:
        assert error and re.match(f"error: RAW: {error}", stop.code)


def test_sheets_as_csv_and_wrong_ones(tmp_path):
    book(f"{tmp_path}/sheet.xlsx", ALL[:7])
    entries = prepare.read_sheet("casme2", f"{tmp_path}/sheet.xlsx")
    lines = list(openpyxl.load_workbook(f"{tmp_path}/sheet.xlsx").worksheets[0].values)
    for delimiter in ",;\t":
        with open(f"{tmp_path}/sheet.csv", "w", newline="", encoding="utf-8-sig") as out:
            csv.writer(out, delimiter=delimiter).writerows([*line, "Emotion"] for line in lines)  # the first counts
            out.write("\r\n")  # an empty line
        assert prepare.read_sheet("casme2", f"{tmp_path}/sheet.csv") == entries and len(entries) == 6
    save(f"{tmp_path}/sheet.csv", b"Emotion,Apex,Subject,Onset,Filename\nfear,5,sub0001,3")  # no offset, no file name
    entry = dict(session="dfme", subject="sub0001", clip="", onset="3", apex="5", emotion="fear", row=2)
    assert prepare.read_sheet("dfme", f"{tmp_path}/sheet.csv") == [entry]
    for name, content, error in (
        ("sheet.csv", b"", "has no cell Subject"), ("sheet.csv", b"a;b\n1;2", "has no cell Subject; needed: Subject, "),
        ("sheet.csv", b"Subject;Filename;Emotion\n1;2;3", "has only the columns Subject, Filename, Emotion;.*casme/e2"),
        ("sheet.xlsx", b"<html>Sign in</html>", "not readable .*zip"),
    ):  # fmt: skip
        save(f"{tmp_path}/{name}", content)
        with pytest.raises(SystemExit, match=f"^error: {tmp_path}/{name}: {error}"):
            prepare.read_sheet("casme2", f"{tmp_path}/{name}")


# ---- prepare: what users get wrong, and what machines do -------------------------------------------------------------
def test_mistakes_end_with_one_line_and_nothing_written(prepared, tmp_path, monkeypatch):
    raw, words = f"{prepared[0]}/raw", ["--raw", f"{prepared[0]}/raw", "--out", f"{tmp_path}/out", "--sessions", "samm"]
    save(f"{tmp_path}/file", b"")
    os.makedirs(tmp_path / "marks" / "samm" / "006")
    for name in ("no clips", "other"):
        book(f"{tmp_path}/{name}/samm/SAMM.xlsx", [entry for entry in ALL if entry[0] == "samm"])
    save(f"{tmp_path}/other/samm/099_1_1/1.jpg", TEXTURE)  # of no clip of the sheet
    for option, value, *parts in (
        ("--raw", "nowhere", "--raw 'nowhere'", "samm"), ("--landmarks", "", "--landmarks ''", "no such folder"),
        ("--size", 7, "--size 7", "8 to 1024"), ("--sessions", "smic", "smic"), ("--out", "", "--out ''"),
        ("--raw", f"{tmp_path}/no clips", "no clip folders", "M.Yap/dataset.php", "found SAMM.xlsx"),
        ("--raw", f"{tmp_path}/other", "no usable entry", "found", "other/samm/099_1_1"),
        ("--raw", f"{tmp_path}/other/samm", "other/samm: no folder samm", "found 099_1_1, SAMM.xlsx", "M.Yap"),
        ("--landmarks", tmp_path, "none of the folders samm, f"),
        ("--landmarks", f"{tmp_path}/marks", "marks/samm", "no landmark files, found 006"),
        ("--out", f"{tmp_path}/file", "/file", "File exists"), ("--out", raw, raw, "not a folder that prepare"),
        ("--out", f"{tmp_path}/file/out", "/file/out", "Not a directory"),
    ):  # fmt: skip
        refused([*words, option, value], *parts)
    for module, package in (("cv2", "opencv-python-headless"), ("openpyxl", "openpyxl")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            refused(words, f"pip install {package}")
    assert not os.path.exists(f"{tmp_path}/out") and len(os.listdir(raw)) == 5
    screen = here("--help")
    assert all(word in screen for word in ("sub01/EP02_01f/reg_img46.jpg", "spNo.1_a_355", "SAMM_Mic", "landmarks"))


def test_interrupted_killed_and_two_at_once(prepared, tmp_path, monkeypatch, capsys):
    """Whenever a run ends, what is there is whole, and others go on from there."""
    root, words, _ = prepared
    command = functools.partial(runpy.run_path, prepare.__file__, run_name="__main__")
    columns, replace = ("session", "subject", "clip", "onset", "slcv", "ilcv"), os.replace
    save(f"{tmp_path}/prepare.json.77.part", b"{")  # of one that was killed at its first write
    full = OSError(28, "No space left on device", "a.png")
    for stop, said in ((KeyboardInterrupt, "130"), (full, "error: a.png: No space left on device"), (SystemExit, "")):
        before, calls = images(tmp_path), itertools.count()

        def ends(*paths, calls=calls, stop=stop):  # and leaves the file without its name, as a kill does
            if next(calls) == 5:
                raise stop
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", ends)
            assert here(*words, "--out", tmp_path, main=command).endswith(said)
        assert len(images(tmp_path)) == len(before) + 3 and before.items() <= images(tmp_path).items()
        # The folds are those of the whole folder, already.
        assert table(tmp_path, "folds.csv", *columns) == table(root / "out", "folds.csv", *columns)
    assert "interrupted; the images that are made are kept" in capsys.readouterr().err
    command = [sys.executable, "-m", "tools.prepare", *words[:2], "--size=64", "--out", tmp_path, "--sessions"]
    runs = [subprocess.Popen([*command, *names], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for names in (("casme2", "samm", "mmew", "casme3"), ("samm", "mmew", "casme3", "dfme"))]  # fmt: skip
    assert [(run.communicate()[1], run.returncode) for run in runs] == [(b"", 0)] * 2
    assert images(tmp_path).keys() == set(EXPECTED) and before.items() <= images(tmp_path).items()
    for name in [*EXPECTED, "folds.csv", "report.csv"]:
        assert (tmp_path / name).read_bytes() == (root / "out" / name).read_bytes()
    assert set(json.loads((tmp_path / "prepare.json").read_text())["sessions"]) == set(HEADERS)


def test_files_are_written_whole_and_by_one_run_at_a_time(prepared, tmp_path, monkeypatch):
    locks, written, lock = [], [], prepare.lock
    monkeypatch.setattr(prepare, "lock", lambda out: locks.append(lock(out)) or locks[-1])
    locked = lambda: any(not file.closed for file in locks)  # noqa: E731
    monkeypatch.setattr(protocols, "write", lambda path, _: written.append((os.path.relpath(path, tmp_path), locked())))
    here(*prepared[1], "--out", tmp_path, "--flow", "--sessions", "samm")
    keys = [(name, False) for key in EXPECTED if "samm" in key for name in (f".flow/{key[:-4]}.npy", key)]
    assert written == [("prepare.json", True), ("folds.csv", True), *keys, ("folds.csv", True), ("report.csv", True)]
    assert not any(path.is_file() for path in tmp_path.glob("**/[!.]*"))
    fcntl = pytest.importorskip("fcntl")
    with lock(tmp_path), open(tmp_path / ".lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    save(f"{tmp_path}/image.png", b"of another run")
    assert prepare.make_image({"key": "image.png", "folder": None}, tmp_path, 64, False) == ("", "")


# ---- report, view, tables, on run folders written by hand -----------------------------------------------------------
# Two sessions of two rows, disgust anger | disgust fear, and two folds. Right after session 1: 1 of 2 and 1 of 1; after
# session 2, of four each: by sum 2 and 3, by prob 3 and 3, by centered 1 and 3, by max 3 and 2.
FINAL = [[3, 0, -1, 1.5], [1, 2, -4, -5], [2, -1, -4, 1], [2, 2.2, 1.9, 0]]
FINAL += [[1, 0, -3, 0.5], [0, 0, 0, 1], [2, 0, -3, 1], [1, 0, 1, 1.4]]
ROWS = dict(emotions=["disgust", "anger", "fear"], row_emotion=[0, 1, 0, 2], row_session=[0, 0, 1, 1])
HAND = [dict(ROWS, labels=["disgust", "anger", "disgust", "fear"], session=[0, 0, 1, 1], subjects=[1, 2, 1, 2],
             scores_0=[[1.0, 0.0]] * 2, scores_1=FINAL[:4], train_counts=[[5, 3, 0], [6, 3, 8]]),
        dict(ROWS, labels=["disgust", "fear", "fear", "disgust"], session=[0, 1, 1, 1], subjects=[2, 1, 1, 3],
             scores_0=[[2.0, 1.0]], scores_1=FINAL[4:], train_counts=[[2, 4, 0], [9, 4, 2]])]  # fmt: skip
BETTER = [HAND[0] | dict(scores_1=9 * np.eye(4)[[0, 1, 0, 3]]), HAND[1]]  # all four of fold 0 right after session 2
PEOPLE = [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]  # (session, subject)


def read(arrays):
    """The arrays of a fold as they are read from its file."""
    times = sum(name.startswith("scores_") for name in arrays)
    return {name: np.array(value) for name, value in arrays.items()} | {"seconds": np.zeros(times)}


def write_run(folder, files=HAND, **changes):
    """A run's folder as protocols.Run writes it, without the folds that are None."""
    arguments = dict(method="der", backbone="vit", protocol="ilcv", preset="tiny", seed=0, changed={})
    arguments |= {name: changes.pop(name) for name in list(changes) if name in arguments}
    info = dict(arguments=arguments, merges=["sum", "prob"], synthetic=True, fold_count=2, images="i0", folds="f0",
                counts={"casme2": dict(samples=239, subjects=26), "samm": dict(samples=130, subjects=27)},
                weights="vit.pt", code={"der.py": "0"}) | changes  # fmt: skip
    os.makedirs(folder)
    (folder / "run.json").write_text(json.dumps(info))
    for i, arrays in enumerate(files):
        if arrays:
            arrays = dict(fold=i, identity=protocols._sha(info), threads=1, processor="AVX2") | read(arrays)
            np.savez(folder / f"fold{i}.npz", **arrays, seal=protocols._seal(arrays))


def rows_of(text):
    """The rows of all Markdown tables, {first two cells: the others}."""
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {(line[0], line[1]): " ".join(line[2:]) for line in lines}


@pytest.fixture
def call(monkeypatch, capfd):
    def run(tool, *words):  # what a command prints, and its notes with its one line of error
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, words)])
        try:
            tool.main()
        except SystemExit as stop:
            print(stop.code, file=sys.stderr)
        return capfd.readouterr()

    return run


def test_report_by_hand(tmp_path, call, monkeypatch):
    write_run(tmp_path / "a" / "1")
    write_run(tmp_path / "b" / "1", method="new", merges=["max", "prob"], code={os.path.join("controls", "new.py"): ""})
    monkeypatch.setattr(report, "paper", lambda info, folds: (1, 2, 3, 2) if info["method"] == "der" else ())
    text = call(report, tmp_path, "--details", "--csv", tmp_path / "a.csv").out
    size = [np.mean([abs(x[r] - sum(x) / 4) for x in FINAL for r in own]) for own in ((0, 1), (2, 3))]
    ends = report.intervals([dict(enumerate(map(read, HAND)))], "sum")
    last = "{:.1f} to {:.1f}".format(*ends["accuracy"][:, 3])
    for row, values in {
        ("backbone", "method"): "S1 S2 avg last last, 95 % last by prob",
        ("-", "always the commonest emotion"): "25.00 37.50 31.25 37.50 - -",
        ("vit", "der"): f"75.00 ± 35.36 62.50 ± 17.68 68.75 ± 26.52 62.50 ± 17.68 {last} 75.00",
        ("vit", "der, the paper, on its own preparation"): "1.00 2.00 3.00 2.00 - -",
        ("sum", "pooled accuracy"): "66.67 62.50 64.58 62.50",
        ("sum", "95 % low UAR"): " ".join(f"{end:.2f}" for end in ends["UAR"][0]),
        ("sum", "pooled UF1"): "40.00 71.43 55.71 71.43",  # (4/5 + 0) / 2; (4/7 + 1 + 4/7) / 3
        ("sum", "pooled UAR"): "50.00 72.22 61.11 72.22",  # (1 + 0) / 2; (1/2 + 1 + 2/3) / 3
        ("sum", "size of scores"): f"{size[0]:.2f} {size[1]:.2f} - -",
        ("prob", "forgetting"): "0.00 - 0.00 -",  # session 1 from 2 right of 3 to 3: never less than nothing
        ("centered", "forgetting"): "33.33 - 33.33 -",  # to 1 right of 3
    }.items():
        assert rows_of(text)[row] == values, row
    assert rows_of(text)["vit", "new, by max"].startswith("75.00 ± 35.36 62.50 ± 17.68 68.75 ± 8.84 62.50 ± 17.68 ")
    by_sum, by_max = (rows_of(part.partition("\n| true")[2]) for part in text.split("### ")[1:])
    assert by_sum == {("disgust", "2"): "0 2", ("anger", "0"): "1 0", ("fear", "1"): "0 2", ("---", "---"): "--- ---"}
    assert by_max["fear", "1"] == "1 1"  # by each run's own first way
    by_prob = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))[1]
    words = "method merge mean_S2 std_avg pooled_UAR_S2 paper_S1 folds samples_casme2 subjects_samm recall_fear".split()
    values = "der prob 75.0000 17.6777 77.7778 1.0000 f0 239 27 33.3333".split()
    assert [by_prob[word.replace("_", " ")] for word in words] == values and by_prob["recall disgust"] == "100.0000"
    write_run(tmp_path / "c" / "1", HAND[:1], method="ranpac", merges=["sum"])  # no logits: prob means nothing
    text = call(report, tmp_path, "--how", "prob").out
    assert "folds f0**, merged by prob\n" in text and "last by prob" not in text
    assert rows_of(text)["-", "always the commonest emotion"] == "25.00 37.50 31.25 37.50 -"  # of both folds
    assert rows_of(text)["vit", "der"].startswith("75.00 ± 35.36 75.00 ± 0.00 75.00 ± 17.68 75.00 ± 0.00 ")
    assert rows_of(text)["vit", "ranpac, by sum (1 of 2 folds)"].startswith("50.00 50.00 50.00 50.00 ")


def noisy(seed):
    """HAND's folds with random scores, and the samples tested after each session: ((session, subject), true, guess)."""
    random = np.random.RandomState(seed)
    scores = [{name: random.randn(*np.shape(fold[name])) for name in ("scores_0", "scores_1")} for fold in HAND]
    folds = {i: read(HAND[i] | scores[i]) for i in range(2)}
    found = [[(protocols.outcome(saved, t), saved["subjects"]) for saved in folds.values()] for t in (0, 1)]
    return folds, [[((s, p), x, y) for out, who in pair for x, y, s, p in zip(*out, who)] for pair in found]


def test_intervals_and_differences_are_those_of_a_loop(monkeypatch):
    rows, session = [[noisy(0), noisy(1)], [noisy(2)]], np.array([0, 0, 1, 1, 1])  # two seeds, and one
    drawn = report.draw(session)
    assert drawn.shape == (2000, 5) and (drawn[:, :2].sum(1) == 2).all() and (drawn[:, 2:].sum(1) == 3).all()
    assert abs((drawn == 0).mean(0) - np.repeat([0.5**2, (2 / 3) ** 3], (2, 3))).max() < 0.05  # how often not drawn
    monkeypatch.setattr(report, "DRAWS", 30)
    monkeypatch.setattr(report, "FLIPS", 300)
    drawn = [dict(zip(PEOPLE, weights)) for weights in report.draw(session)]

    def again(row, measure, weights):  # of each sample as many as its subject was drawn; S1 and S2, means over seeds
        times = [[[s[1:] for s in seed[t] for _ in range(weights[s[0]])] for _, seed in row] for t in (0, 1)]
        return np.array([100 * np.mean([measure(*zip(*pairs)) for pairs in samples]) for samples in times])

    ends = lambda values: np.quantile([[*v, np.mean(v), v[1]] for v in values], (0.025, 0.975), 0)  # noqa: E731
    for name, measure in report.MEASURES.items():
        expected = ends([again(rows[0], measure, weights) for weights in drawn])
        np.testing.assert_allclose(report.intervals([folds for folds, _ in rows[0]], "sum")[name], expected)
    value, low, high, p = report.difference(*([report.by_subject(folds, "sum") for folds, _ in row] for row in rows))
    less = [np.subtract(*(again(row, protocols.accuracy, weights) for row in rows)) for weights in drawn]
    np.testing.assert_allclose([low, high], ends(less)[:, :3])
    share = [[[100 * np.mean([[w == who and x == y for w, x, y in seed[t]] for _, seed in row]) for who in PEOPLE]
              for t in (0, 1)] for row in rows]  # fmt: skip
    sums = np.subtract(*share) @ np.vstack([np.ones(5), np.random.default_rng(0).choice((-1.0, 1.0), (300, 5))]).T
    sums = np.vstack([sums, sums.mean(0)])  # (S1 S2 avg, as it is and then 300 flips)
    np.testing.assert_allclose(value, sums[:, 0])
    np.testing.assert_allclose(p, (abs(sums) > abs(sums[:, :1]) - 1e-9).sum(1) / 301)
    assert len(set(p)) > 1 and 0.01 < min(p) < 0.9  # neither none nor all


def test_seeds_are_one_row(tmp_path, call):
    """S2 of the two folds is 50 and 75 by seed 0, 100 and 75 by seed 1; S1 is 50 and 100 by both."""
    for place, (files, seed) in {"0": (HAND, 0), "1": (BETTER, 1), "copy": (BETTER, 1)}.items():
        write_run(tmp_path / place / "1", files, seed=seed)
    out = rows_of(call(report, tmp_path, "--csv", tmp_path / "a.csv", "--details").out)
    both = "75.00 ± 35.36 75.00 ± 0.00 75.00 ± 17.68 75.00 ± 0.00 {:.1f} to {:.1f} 62.5 to 87.5 81.25"
    ends = report.intervals([dict(enumerate(map(read, files))) for files in (HAND, BETTER)], "sum")["accuracy"][:, 3]
    assert out["backbone", "method"] == "S1 S2 avg last last, 95 % last of the seeds last by prob"
    assert out["vit", "der, 2 seeds"] == both.format(*ends)
    assert out["sum", "mean"] == "75.00 75.00 75.00 75.00" and out["sum", "forgetting"] == "0.00 - 0.00 -"
    assert out["fear", "1"] == "0 5"  # the confusion matrix holds both seeds
    by_sum = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))[0]
    words = ("seeds", "std avg", "pooled accuracy S2", "recall disgust", "lowest seed last")
    assert [by_sum[word] for word in words] == ["0 1", "17.6777", "75.0000", "62.5000", "62.5000"]
    for seed, name in itertools.product((0, 1), ("none", "a.pt")):  # random weights differ from seed to seed
        changes = dict(seed=seed, changed={"weights": name}, weights=f"{name}, sha256 {seed}")
        write_run(tmp_path / f"weights {name} {seed}" / "1", **changes)
    found = rows_of(call(report, tmp_path).out)
    assert {("vit", f"der weights={word}") for word in ("none, 2 seeds", "a.pt", "a.pt, seed 1")} < found.keys()
    for folder in tmp_path.glob("weights*"):
        shutil.rmtree(folder)
    apart = rows_of(call(report, tmp_path, "--each-seed").out)
    assert [apart["vit", f"der, seed {seed}"][14:19] for seed in (0, 1)] == ["62.50", "87.50"] and len(apart) == 5
    write_run(tmp_path / "2" / "1", [BETTER[0], None], seed=2)
    assert ("vit", "der, 3 seeds (1 of 2 folds)") in rows_of(call(report, tmp_path).out)
    write_run(tmp_path / "3" / "1", [None, HAND[1]], seed=3)  # now they have no fold in common
    write_run(tmp_path / "4" / "1", seed=4, code={"der.py": "1"}, versions={"torch": "3"})
    text = call(report, tmp_path).out
    labels = ["der", "der, seed 1", "der, seed 2 (1 of 2 folds)", "der, seed 3 (1 of 2 folds)", "der, seed 4"]
    assert [row[1] for row in rows_of(text) if row[0] == "vit"] == labels
    assert text.count("not one row") == 1 and "vit der, seed 4 differ in code and versions" in text


def test_compare(tmp_path, call, monkeypatch):
    """new has two more of the eight samples right than der, of two subjects."""
    monkeypatch.chdir(tmp_path)
    for i, (files, change) in enumerate([
        (HAND, {}), (BETTER, dict(method="new")), (HAND, dict(backbone="swin")), (HAND, dict(seed=1)),
        (BETTER, dict(method="pixels", backbone="none")), (HAND[:1], dict(method="half")), (HAND, dict(method="twice")),
        (BETTER, dict(method="older", folds="f1")), (HAND, dict(method="new", backbone="resnet")),
        (HAND, dict(method="twice", code={})), (BETTER, dict(protocol="slcv")), (HAND, dict(protocol="slcv", seed=1)),
    ]):  # fmt: skip
        write_run(tmp_path / "runs" / f"r{i}" / "1", files, **change)
    out, notes = call(report, "runs", "--compare", "der", "new")
    assert out.count("**ILCV") == 1 and notes.count("nothing to compare with") == 3  # swin, resnet, slcv
    value, ends, p = ([cell.strip() for cell in line.split("|")[2:-1]] for line in out.splitlines()[-3:])
    assert value == ["der, 2 seeds - new", "+0.00", "-25.00", "-12.50"] and ends[:2] == ["95 %", "+0.00 to +0.00"]
    assert p[1] == "1.0000" and 0.48 < float(p[2]) < 0.52  # two subjects: both signs are alike in half of the flips
    out = rows_of(call(report, "runs", "--compare", "pixels", "der", "--how", "max").out)
    assert [row for row in out if "pixels" in row[1]] == [("swin", "pixels - der"), ("vit", "pixels - der, 2 seeds")]
    out = rows_of(call(report, "runs", "--compare", "runs/r10", "runs/r11/1").out)  # folders tell seeds apart
    assert out["vit", "der - der, seed 1"] == "+0.00 +25.00 +12.50"
    for words, parts in {
        "der nosuch": "nosuch: no such run; there are der, half, new, older, pixels, twice, and their folders",
        "der half": "der has folds 0 1, half 0 (ILCV,", "der older": "images i0, folds f1 (vit)",
        "der runs": "several rows of ILCV", "new twice": "several rows of ILCV",
        "der new --csv a.csv": "--compare stands alone", "der new --each-seed": "--compare stands alone",
    }.items():  # fmt: skip
        out, notes = call(report, "runs", "--compare", *words.split())
        assert not out and notes.splitlines()[-1].startswith("error: --compare") and parts in notes, words


def test_loso_is_pooled_and_the_paper_stands_beside_its_like(tmp_path, call):
    """True 0 0 1 1 2, answers 0 1 1 1 0, of two people: 3 and 2; the commonest emotion in training is 0."""
    shared = dict(emotions=["a", "b", "c"], row_emotion=[0, 1, 2], row_session=[0] * 3, train_counts=[[3, 2, 1]])
    files = [shared | dict(labels=["a", "a", "b"], session=[0] * 3, scores_0=np.eye(3)[[0, 1, 1]], subjects=[4] * 3),
             shared | dict(labels=["b", "c"], session=[0, 0], scores_0=np.eye(3)[[1, 0]], subjects=[7, 7])]  # fmt: skip
    real, loso = dict(synthetic=False, preset="paper"), dict(method="finetune", protocol="loso")
    casme2 = {"casme2": dict(samples=240, subjects=2)}
    write_run(tmp_path / "a" / "1", files, **real, **loso, counts=casme2)
    write_run(tmp_path / "b" / "1", files[:1], **real, **loso | {"method": "der"}, counts=casme2)
    text = call(report, tmp_path, "--csv", tmp_path / "a.csv").out
    for row, values in {
        ("backbone", "method"): "accuracy UF1 UAR accuracy, 95 %",
        ("-", "always the commonest emotion"): "40.00 19.05 33.33 -",
        ("vit", "finetune"): "60.00 43.33 50.00 50.0 to 66.7",  # (2/4 + 4/5 + 0) / 3, (1/2 + 1 + 0) / 3
        ("vit", "finetune, the paper, on its own preparation"): "76.60 72.30 71.90 -",
        ("vit", "der (1 of 2 folds)"): "66.67 66.67 75.00 -",  # one person has no interval
    }.items():
        assert rows_of(text)[row] == values, row
    assert "240 of 246 samples" in text and "95 % low UAR" in (tmp_path / "a.csv").read_text()
    assert "more than one session" in call(report, tmp_path, "--plot", "a.png").err
    assert "| difference | accuracy |\n" in call(report, tmp_path, "--compare", "finetune", "finetune").out

    least, five = dict(casme2=232, samm=128, mmew=278, casme3=761), dict.fromkeys(range(5))  # 95 % of the usable
    counts = lambda **change: {name: {"samples": count} for name, count in (least | change).items()}  # noqa: E731
    good = real | dict(method="ranpac", backbone="vit", protocol="ilcv", changed={}, counts=counts(), fold_count=5)
    for change in (
        dict(changed={"weights": "none"}), dict(changed={"lr": 1.0}), dict(synthetic=True), dict(fold_count=3),
        dict(fold_count=6), dict(preset="tiny"), dict(method="linear"), dict(counts=counts(dfme=1856)),
        dict(counts=dict(reversed(counts().items()))), dict(counts=casme2),
        *(dict(counts=counts(**{name: count - 1})) for name, count in least.items()),
        *(loso | dict(counts={name: {"samples": count}}) for name, count in {"casme2": 231, "samm": 134}.items()),
    ):  # fmt: skip
        assert not report.paper(good | change, five), change
    assert not report.paper(good, {0: {}}) and "1,399 of 1,534 samples" in report.title(good | dict(images=0, folds=0))
    assert report.paper(good | loso | {"counts": casme2}, five) == (76.6, 72.3, 71.9)
    for change in ({}, {"changed": {"weights": "vit.safetensors"}}):
        assert report.paper(good | change, five) == (53.23, 46.18, 50.50, 43.84, 48.44, 43.84)
    assert len(report.TABLE2) == 28 and all(abs(sum(row[:4]) / 4 - row[4]) < 0.011 for row in report.TABLE2.values())


def test_plot(tmp_path, call, monkeypatch):
    """Eight methods and four controls: of each its line, the paper's marks, and a way to its name, with its mark."""
    axes, lines, names = pytest.importorskip("matplotlib.axes").Axes, [], []
    monkeypatch.setattr(axes, "plot", lambda *a, draw=axes.plot, **k: lines.append((list(a[-1]), k)) or draw(*a, **k))
    monkeypatch.setattr(axes, "text", lambda *a, draw=axes.text, **k: names.append(a[3]) or draw(*a, **k))
    monkeypatch.setattr(report, "paper", lambda info, folds: (1, 2, 3, 2) if info["method"] == "A" else ())
    for name in "ABCDEFGHIJKL":
        code = {os.path.join("controls" * (name > "H"), f"{name}.py"): ""}
        write_run(tmp_path / name / "1", method=name, code=code)
    write_run(tmp_path / "seed1" / "1", BETTER, method="H", code={"H.py": ""}, seed=1)
    call(report, tmp_path, "--plot", tmp_path / "a.png")
    assert [values for values, _ in lines[::4]] == [[75, 62.5]] * 7 + [[75, 75]] + [[75, 62.5]] * 4
    assert [values for values, _ in lines[1::4]] == [[1, 2]] + [[]] * 11 and lines[1][1]["mfc"] == "none"
    styles = [(style["color"], style.get("marker"), style.get("ls")) for _, style in lines[::4]]
    assert len({how[0] for how in styles}) == len({how[1:] for how in styles}) == 12
    assert all(mark and not dash for _, mark, dash in styles[:8])
    assert all(float(grey) < 0.6 and dash and not mark for grey, mark, dash in styles[8:])
    assert names == [*"ABCDEFG", "H, 2 seeds", *"IJKL"] and min(np.diff(sorted(v[0] for v, _ in lines[3::4]))) > 0.1
    places = report.spread([5, 50, 5.1, 5, -9], 2)  # moved about their middle, in their order
    assert places.round(9).tolist() == [3.05, 50, 7.05, 5.05, -9] and Image.open(tmp_path / "a.png").width > 400
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in call(report, tmp_path, "--plot", "a.png").err


def test_which_runs_stand_where(tmp_path, call):
    mine = {"casme2": {"samples": 239, "subjects": 9}, "mine": {"samples": 1000, "subjects": 9}}  # not in data.DATASETS
    for i, change in enumerate([{}, {"images": "i1"}, {"folds": "f1"}, {"counts": mine}, {"preset": "paper"}]):
        write_run(tmp_path / "tables" / str(i) / "1", **change)
    write_run(tmp_path / "tables" / "same" / "1", backbone="swin", seed=1)
    text = call(report, tmp_path / "tables").out
    assert text.count("**ILCV, synthetic stream, casme2, samm, tiny preset, 369 of 382 samples, images i") == 3
    assert text.count("**") == 10 and "casme2, mine, tiny preset, 1,239 samples" in text and "| der, seed 1 |" in text
    root, ages = tmp_path / "names", {"b/1": 30, "b/2": 10, "b/3": 20, "c/1": 0, "d/1": 0, "old": 0, "broken": 0}
    for lr, (place, age) in enumerate(ages.items()):
        write_run(root / place, [HAND[0], HAND[1] | {"threads": 2}] if place == "d/1" else HAND, changed={"lr": lr})
        for file in os.listdir(root / place):
            os.utime(root / place / file, (1e9 - age, 1e9 - age))
    os.utime(root / "b/3/fold1.npz", (1e9, 1e9))  # of three runs with one name the last fold was made by the third
    (root / "c/1/fold0.npz").write_bytes((root / "b/1/fold0.npz").read_bytes())  # of another run
    (root / "c/1/fold1.npz").write_bytes(b"PK no archive")
    (root / "old/run.json").write_text('{"fold_count": 5, "method": "der"}')  # of the first edition
    (root / "broken/run.json").write_text("{")
    text, notes = call(report, root)
    assert [row[1] for row in rows_of(text) if row[0] == "vit"] == ["der lr=2", "der lr=4"]
    assert text.count("mixed") == 1 and "the folds of vit der lr=4 differ in threads" in text
    words = ["b/1 (older)", "b/2 (older)", "c/1 (no finished fold)", "old (no run", "broken (no run"]
    assert all(word in notes.splitlines()[-1] for word in words) and notes.count(": not used (") == 2


def test_export_show_check(tmp_path, monkeypatch):
    viewed = functools.partial(here, "--size", 8, "--sessions=casme2", main=view.main)
    out, junk = tmp_path / "new/made", tmp_path / "new/made.part/samm_x"
    os.makedirs(junk)  # left by a killed export of the first edition
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: signal.default_int_handler(2, None))
        assert viewed("export", "--out", out) == "130"  # interrupted
    assert [folders for _, folders, _ in os.walk(tmp_path / "new")] == [["made.part"], ["samm_x"], []]
    viewed("export", "--out", out)
    (made,), (read,) = data.synthetic(8, sessions=["casme2"]), data.load(str(out), ["casme2"], 8)
    assert all(np.array_equal(vars(made)[name], vars(read)[name]) for name in ("images", "labels", "subjects", "keys"))
    assert len(os.listdir(out)) == 5 and os.stat(out).st_mode == os.stat(junk).st_mode  # others may read it
    viewed("show", "--data", out, "--out", tmp_path / "a.png")
    sheet, second = Image.open(tmp_path / "a.png"), np.flatnonzero(read.subjects != read.subjects[0])[0]
    for left, i in ((70, 0), (126, second)):  # of disgust, the first images of two subjects
        image = Image.fromarray(read.images[i].transpose(1, 2, 0)).resize((56, 56))
        assert np.array_equal(np.asarray(sheet)[21:77, left : left + 56], np.asarray(image))
    os.remove(out / made.keys[-1])
    assert "exists already" in viewed("export", "--out", out)
    lines = [line.split() for line in viewed("check", "--data", out).splitlines()[-6:]]
    assert lines[0] == "casme2 245 samples of 246 26 subjects of 26".split()
    assert lines[-2:] == ["repression 27 of 27".split(), "surprise 24 of 25 -1".split()]


def test_tables_has_every_row(call):
    rows = [f"python {method}.py --backbone {backbone} --protocol {p}" for p, backbone, method in report.TABLE2]
    rows += [f"python finetune.py --backbone {name} --protocol loso --sessions casme2" for _, name, _ in report.TABLE3]
    lines = call(tables, "--dry-run").out.splitlines()
    assert sorted(lines) == sorted(f"{row} --seed 0 --out {os.path.join('results', 'table')}" for row in rows)
    more = "--data no/where --preset tiny --out o"
    lines = call(tables, *f"--seeds 2 0 2 --controls --dry-run {more}".split()).out.splitlines()
    assert len(set(lines)) == len(lines) == 2 * 63 and all(line.endswith(more) for line in lines)
    assert f"python -m controls.norch --backbone swin --protocol slcv --seed 2 {more}" in lines


def test_tables_runs_one_per_device(tmp_path, call, monkeypatch):
    fails = ["-c", "import os, sys; print('a line'); sys.exit('error: threads ' + os.environ['OMP_NUM_THREADS'])"]
    real = ["-m", "controls.pixels", "--projected", "100", "--folds", "0", "--sessions", "casme2", "samm", "mmew"]
    monkeypatch.setattr(tables, "commands", lambda *_: [fails, [*real, "--out", str(tmp_path / "table")]])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    out, notes = call(tables, "--out", tmp_path / "table")
    assert ("none", "pixels projected=100 (1 of 5 folds)") in rows_of(out)  # a run as it is written is read
    rows = rows_of(call(report, tmp_path / "table", "--details").out)
    assert [cell == "-" for cell in rows["sum", "forgetting"].split()] == [False, False, True, False, True]
    assert "1 of 2 left after " in notes and "0 of 2 left after " in notes and "failed: -c" in notes
    assert "error: threads 1" in notes.splitlines()[-2] and notes.splitlines()[-1].startswith("error: 1 runs failed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tables.devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    job = """import os, sys, time\nname = sys.argv[1] + os.environ["CUDA_VISIBLE_DEVICES"]
os.mkdir(name)  # stops where another is at work on this device\ntime.sleep(0.2)\nos.rmdir(name)
open(sys.argv[1] + "log", "a").write(name[-1] + os.environ["OMP_NUM_THREADS"] + " ")"""
    assert not tables.run_all([["-c", job, f"{tmp_path}/"]] * 5, len(tables.devices()))
    assert set((tmp_path / "log").read_text().split()) == {"33", "53"}  # both were used; threads are left as they are


def test_mistakes_end_with_one_line(tmp_path, call):
    write_run(tmp_path / "a" / "1", [])
    for tool, words, error in (
        (report, "''", "no such folder"), (report, tmp_path, "no finished fold"), (report, "a --csv ''", "--csv"),
        (report, "a --plot ''", "--plot"), (report, "a --plot a.doc", "--plot"), (view, "show --out a.doc", ".png"),
        (view, "check --data ''", "no such folder"), (view, "export --out ''", "needs"), (tables, "--out ''", "--out"),
        (view, "export --out a --data b", "no --data"), (view, "check --out a", "no --out"),
        (view, "check --size 3", "--size 3"), (tables, "--jobs 0", "--jobs"),
        (tables, "--data nowhere", "no such folder"), (tables, "--data '' --dry-run", "--data"),
        (tables, "--alike --dry-run", "--alike"),
    ):  # fmt: skip
        out, notes = call(tool, *shlex.split(str(words)))
        assert not out and notes.splitlines()[-1].startswith("error: ") and error in notes.splitlines()[-1], words


@pytest.fixture
def gpu_bench(call, monkeypatch):
    """gpu_bench(scripts, *parts): what `bench --gpu --device cpu` prints for these scripts, and its error."""

    def run(scripts, *parts):
        monkeypatch.setattr(bench, "SCRIPTS", scripts)
        monkeypatch.setattr(bench, "ON_ALL", scripts[:1])
        return call(bench, "--gpu", "--device", "cpu", "--parts", *parts)

    return run


def test_bench_gpu_tried_on_the_cpu(gpu_bench, monkeypatch):
    """The tables have a row per script, CPU against CPU differs by nothing, and what fails is one line and is counted.

    Not driven here: the processes side by side, which take long to start, and what only CUDA can tell."""
    out, stop = gpu_bench(["controls.linear", "nowhere", "controls.pixels"], "scores", "sessions", "ridges")
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [line[:3] for line in lines[2:4]] == [[f"controls.{name}", "0 %", "0 %"] for name in ("linear", "pixels")]
    rows = [line for line in lines if len(line) == 5 and line[0] != "---"][1:]
    what = [f"{line[0]} {line[1]} {line[3]} {line[4]}" for line in rows]
    assert what == [f"controls.{name} - -" for name in ("linear vit", "pixels vit", "linear swin", "linear resnet")]
    assert all(0 <= float(line[2]) < 60 for line in rows)
    assert len(lines[-1]) == 4 and all(float(cell) > 0 for cell in lines[-1])  # the ridge's sessions
    assert out.count("failed: nowhere: ModuleNotFoundError: No module named 'nowhere'\n") == 1
    assert stop == "error: 2 failed: nowhere, nowhere --backbone vit\n"

    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one after the other: the second is the first
    monkeypatch.setattr(bench, "torchrun", functools.cache(bench.torchrun))
    out, stop = gpu_bench(["controls.pixels"], "accuracies")
    assert not stop and re.search(r"\n\| controls.pixels \| (\d\d\.\d\d) \| \1 \| \+0.00 \|  \|\n$", out)
    assert bench.rate("vit", "cpu") > 0


def test_bench_marks_what_differs_and_names_what_failed(gpu_bench, monkeypatch):
    found = iter([0.96, 1.0, 0.94, 1.0, 1.0, 0.99995, 1.0, 0.9998])  # of two scripts, on the device and on the CPU
    scores = lambda script, *flags, device: {0: dict.fromkeys(["scores_0", "scores_1"], np.array([next(found)]))}  # noqa: E731
    monkeypatch.setattr(bench, "run_here", scores)
    out, _ = gpu_bench(["der", "foster", "controls.linear", "controls.pixels"], "scores")
    marks = [line.strip("| ").split(" | ")[3:] for line in out.splitlines()[-4:]]
    assert marks == [[], ["above 5 %"], [], ["above 0.01 %"]], out
    found = iter([50.0, 52.0, 50.0, 47.9])
    monkeypatch.setattr(bench, "torchrun", lambda *words: next(found))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    out, _ = gpu_bench(["der", "foster"], "accuracies")
    assert out.splitlines()[-2:] == [
        "| der | 50.00 | 52.00 | +2.00 |  |",
        "| foster | 50.00 | 47.90 | -2.10 | above 2 |",
    ]
    # Of processes side by side the one that failed is named, not one that waited for it.
    jobs = [concurrent.futures.Future() for _ in range(3)]
    for job, error in zip(jobs, (threading.BrokenBarrierError(), MemoryError("full"), threading.BrokenBarrierError())):
        job.set_exception(error)
    with pytest.raises(MemoryError):
        bench.together_rate(jobs)


def test_bench_lists_the_lines_that_wait(monkeypatch):
    """On the CPU, with what CUDA would say put in, from inside of a library: the script's line is what is named."""

    def warned(word):
        if modes[-1] == "warn":
            warnings.warn(f"called a {word} CUDA operation", stacklevel=1)

    code = """
warned("synchronizing")  # outside of the loop waits do not count
for step, _ in enumerate(batches):
    warned("different")
    if step in some:
        warned("synchronizing"), warned("synchronizing")
    warned("synchronizing")
"""

    def run_here(script, *flags, device):
        for count in (6, 10):
            names = {"warned": warned, "batches": common.batches(count, 2, 1, "cpu"), "some": [0] * (count == 6)}
            exec(compile(code, f"{common.HERE}/der.py", "exec"), names)
        return {0: {"seconds": [1.0, 2.5]}}

    monkeypatch.setattr(bench, "run_here", run_here)
    for name, value in {"reset_peak_memory_stats": None, "max_memory_allocated": 3 * 2**20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert bench.watched("der", "cuda") == ("3.5", "3", "der.py:7 (8 of 8), der.py:6 (1 of 8)")
    assert modes == ["default", "warn", "default", "warn", "default"]


def test_bench_gpu_needs_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, error in (
        ("--gpu", "--gpu: torch sees no CUDA device here$"), ("--gpu --parts loop", "--parts loop: of scores, "),
        ("--device cpu", "--device and --compile go with --gpu"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["bench", *words.split()])
        with pytest.raises(SystemExit, match=f"^error: {error}"):
            bench.main()


# ---- pretrain, the shipped weight files and docs/ -------------------------------------------------------------------
@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, *words) calls main() of a script, such as "tools.view", and returns what it prints."""

    def call(script, *words):
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
        try:
            return module.main() or capsys.readouterr().out
        except SystemExit as stop:
            return stop.code or capsys.readouterr().out

    return call


def test_pretrain_makes_files_that_every_method_takes(run, tmp_path):
    flags = "--sessions casme2 --folds 0 --epochs-first 0 --projected 100 --out".split() + [tmp_path / "results"]
    for backbone, preset, size in (("resnet", "tiny", 48), ("resnet10t", "paper", 40),
                                   ("vit_tiny_patch16_224", "paper", 32)):  # fmt: skip
        file = tmp_path / f"{backbone}.pt"
        images, lr = (3000, 0.003) if preset == "tiny" else (150, 0.001)
        words = ["--backbone", backbone, "--images", images, "--batch", 50, "--size", size, "--lr", lr, "--out", file]
        losses = re.findall(r"held-out loss (\S+)", run("tiny.pretrain", *words))
        made = torch.load(file, weights_only=True)["made"]
        assert len(losses) == min(10, images // 50) and made["size"] == size
        assert f"{made['held_out_loss']:.4f}" == losses[-1]
        assert preset == "paper" or made["held_out_loss"] < 0.95 * made["no_motion_loss"]  # it learns
        screen = run("ranpac", "--backbone", backbone, "--preset", preset, "--weights", file, *flags)
        assert f"({file.name}, {size} px, " in screen, screen


def test_pretrain_mistakes_are_one_line_and_write_nothing(run, tmp_path):
    out = tmp_path / "made.pt"
    for words, error in (
        ("--backbone test_vit --size 6", "that takes 6 pixels"), ("--backbone odd", "--backbone odd"),
        ("--backbone vit --size 96", "--size 96"), ("--lr inf", "--lr inf"), ("--lr nan", "--lr nan"),
        ("--lr -1", "--lr -1"), ("--images 10", "--images 10"), ("--batch 1", "--batch 1"), ("--seed -1", "--seed -1"),
        ("--backbone resnet --images 40 --batch 2 --lr 1e20", "not finite"),
    ):  # fmt: skip
        line = run("tiny.pretrain", *words.split(), "--out", out)
        assert line.startswith("error: ") and error in line and "\n" not in line and not out.exists(), (words, line)


def test_pretrain_targets_are_the_clean_flow_in_cells():
    images, targets = pretrain.Batches(2, 3, 48, 5)[1]  # the second batch, of three images
    clean, seen = pretrain.random_flows(np.random.RandomState([5, 1]), 3, 48)
    for i in range(3):
        largest = max(np.hypot(*seen[i, y, x]) for y in range(48) for x in range(48))
        cells = [
            clean[i, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8, k].mean() for k in (0, 1) for r in range(6) for c in range(6)
        ]
        np.testing.assert_allclose(targets[i], 7 * np.array(cells) / largest, atol=1e-5)
        assert (images[i].numpy() == data.flow_to_image(seen[i : i + 1])[0]).all()
    big = pretrain.Batches(1, 1, 100, 0)[0]
    assert [tuple(part.shape) for part in big] == [(1, 3, 100, 100), (1, 72)]


def test_pretrain_replaces_no_shipped_file_for_an_empty_path(run, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "HERE", str(tmp_path))  # beside which the shipped files would be
    for out in ("", "/", str(tmp_path)):
        assert run("tiny.pretrain", "--images", 100, "--out", out) == f"error: --out {out!r}: must name a file"
    assert not list(tmp_path.iterdir())


def test_shipped_files_are_small_safe_and_say_how_they_were_made():
    paths = {name: pathlib.Path(common.HERE, "tiny", f"{name}.pt") for name in common.TINY}
    for name, path in paths.items():
        made = torch.load(path, weights_only=True)["made"]
        assert f"pretrain --backbone {name}" in made["command"]
        assert made["held_out_loss"] < 0.25 * made["no_motion_loss"]
    assert sum(path.stat().st_size for path in paths.values()) < 6e6


def test_random_flows_are_those_that_the_shipped_files_were_trained_on():
    random = np.random.RandomState(0)
    clean, seen = pretrain.random_flows(random, 3, 48)  # numbers of the first edition
    values = [clean.sum(), seen.sum(), *clean[2, 20, 30], *seen[2, 20, 30]]
    np.testing.assert_allclose(values, [719.874, 1416.560, 0.00951, -0.01987, 0.15224, 0.03938], rtol=1e-3)
    assert random.randint(2**31) == 1291920150  # as many draws


def test_alike_is_what_a_folder_without_others_gives(run, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "REAL", {"controls.pixels": (86.2, 67.5, None, 53)})
    line = run("tools.tables", "--alike", "--seeds", 3).splitlines()[-1]
    found = re.fullmatch(
        r"controls.pixels +86.2 / (\S+) \((\S+)\) +67.5 / (\S+) \(.*\) +- / (\S+) +53 / (\S+) \(.*\)", line
    )
    sessions = data.synthetic(48, 3, ["casme2", "samm"])
    view.export(sessions, tmp_path / "alike")
    for folder in (tmp_path / "alike").glob("*_others"):
        shutil.rmtree(folder)
    flags = ["--preset", "tiny", "--protocol", "slcv", "--sessions", "casme2", "samm", "--out", tmp_path / "results"]
    screen = run("controls.pixels", "--data", tmp_path / "alike", *flags)
    means = re.search(r"sum, mean over folds +(\S+) +(\S+)", screen).groups()
    tests = re.search(r"after samm +(\S+) +(\S+)", screen).groups()
    expected = [*means, *tests]
    assert np.allclose(np.float64([found[1], *found.groups()[2:]]), np.float64(expected), atol=0.06)
    assert abs(float(found[2]) - (float(means[0]) - 86.2)) < 0.11


def test_commands_in_docs_have_flags_that_exist(run):
    scripts = {}  # {script: flags} of all that docs/ names
    for path in pathlib.Path(common.HERE, "docs").glob("*.md"):
        pieces = path.read_text(encoding="utf-8").split("```")  # every second one is a block; the others have code in `
        code = "\0".join([*"".join(pieces[1::2]).splitlines(), *re.findall(r"`([^`]+)`", "".join(pieces[::2]))])
        for module, script, more in re.findall(r"(?:-m\s+([\w.]+)|(\w+)\.py)\b([^;#'\0]*)", code):
            scripts.setdefault(module or script, set()).update(re.findall(r"--[\w-]+", more))
    assert {"tools.prepare", "tools.view", "tools.report", "tools.tables", "tools.bench", "tiny.pretrain"} < set(
        scripts
    )
    for script in set(scripts) - {"FILE", "test_all"}:  # any script, and the first edition's
        assert scripts[script] <= set(re.findall(r"--[\w-]+", run(script, "--help").split("\noptions:")[1])), script
