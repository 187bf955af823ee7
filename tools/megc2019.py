"""Real flow that is public: the 442 flow images of MEGC 2019 in HTNet's repository, as a processed folder.

    git clone --depth 1 --filter=blob:none --sparse https://github.com/wangzhifengharrison/HTNet
    git -C HTNet sparse-checkout set datasets/STSNet_whole_norm_u_v_os
    python -m tools.megc2019 --repo HTNet --out megc2019
    python ranpac.py --data megc2019 --preset tiny --protocol slcv --sessions smic-3 casme2-3 samm-3

Three sessions in order of publication, SMIC, CASME II and SAMM, with three classes of merged emotions: negative,
positive, surprise. An image is 28 x 28 pixels; red, green and blue are u, v and optical strain of the flow from onset
to apex, each scaled from 0 to 255 within the image (how the flow was computed is not said there). --composite makes one
session of all instead, megc-3, for MEGC 2019's own protocol, leave one subject out:

    python -m tools.megc2019 --repo HTNet --out megc2019-composite --composite
    python finetune.py --data megc2019-composite --preset tiny --protocol loso --sessions megc-3

The images are those of the three datasets, whose licences hold; none is part of this project.
"""

import csv
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

import common
import data
from tools import view

LIST, IMAGES = "combined_3_class2_for_optical_flow.csv", "datasets/STSNet_whole_norm_u_v_os"
SESSIONS = {"smic": "smic-3", "casme2": "casme2-3", "samm": "samm-3"}  # the list's word: ours
CLASSES = {"0": "negative", "1": "positive", "2": "surprise"}


def read(repo, composite):
    """The images, {key below the processed folder: bytes}. Ends with one line if one is missing or of another kind."""
    images, line = {}, {}
    try:
        lines = list(csv.DictReader(io.StringIO(Path(repo, LIST).read_text("utf-8"))))
        for line in lines:
            dataset, subject, clip = line["dataset"], line["sub"], line["filename_o"]
            content = Path(repo, IMAGES, f"{subject}_{clip} .png").read_bytes()  # with a blank before the dot
            with Image.open(io.BytesIO(content)) as image:
                image.load()  # a truncated one ends here
                if image.size != (28, 28) or image.mode != "RGB":
                    raise ValueError(f"the image of {subject} {clip} is {image.size} {image.mode}, not 28 x 28 RGB")
            session, name = SESSIONS[dataset], f"{subject}_{clip}.png"
            if composite:  # a person's number is 1000 x the dataset's place + their own
                number = 1000 * (1 + list(SESSIONS).index(dataset)) + int(re.sub(r"\D", "", subject))
                session, name = "megc-3", f"sub{number}_{dataset}_{clip}.png"
            images[f"{session}_{CLASSES[line['label']]}/{name}"] = content
    except (OSError, KeyError, ValueError) as error:
        at = f", at {line.get('sub')} {line['filename_o']}" if "filename_o" in line else ""
        sys.exit(f"error: {repo}: not HTNet's {LIST} and {IMAGES}{at} ({error})")
    counts = Counter(key.partition("/")[0] for key in images)
    for session in ["megc-3"] if composite else SESSIONS.values():
        for emotion, count in data.DATASETS[session].items():
            own = counts.pop(f"{session}_{emotion}", 0)
            if own != count:
                sys.exit(f"error: {repo}: {own} images of {session} {emotion} instead of {count}")
    return images


def main():
    p = common.parser(__doc__)
    p.add_argument("--repo", required=True, help="a clone of HTNet's repository")
    p.add_argument("--out", required=True, help="processed folder to write, new or empty")
    p.add_argument("--composite", action="store_true", help="one session megc-3 instead of three")
    args = p.parse_args()
    images = read(args.repo, args.composite)
    sessions = ["megc-3"] if args.composite else list(SESSIONS.values())
    with view.new_folder(args.out) as made:
        for key, content in images.items():
            Path(made, key).parent.mkdir(exist_ok=True)
            Path(made, key).write_bytes(content)
        about = {"source": "HTNet, MEGC 2019", "coding": "u, v, strain", "crop": "as published"}
        Path(made, "prepare.json").write_text(json.dumps(about, indent=1), "utf-8")
        view.folds(data.load(str(made), sessions, 28), str(made))
    print(f"{args.out}: {len(images)} images of {', '.join(sessions)}")


if __name__ == "__main__":
    common.launch(main, "the same command starts anew")
