"""Finetune: train the whole network on each new session, with nothing to protect the old ones.

A session is one dataset; sessions come one after another. In each, the backbone and a new head are
trained on the session's own images. The old heads do not change, but the features that they read
do, so what was learned is lost: catastrophic forgetting.
    grown     one linear head; each output, a row, is one emotion of this session
    trained   the backbone and the new head, by cross-entropy over the new rows
    frozen    the old heads
    tested    on the test images of all sessions so far; rch.py tells how rows become emotions
There are no exemplars (kept images of old sessions), so no loss compares the rows of different
sessions: their scores can have different offsets and scales, and in a sum the largest may decide.
Still, no loss pushes old rows down, as the losses of der.py and foster.py do.
Paper: the benchmark, arXiv 2501.19111, section 3.4. What differs: docs/differences.md
Run:   python finetune.py --backbone vit --protocol ilcv
       synthetic stream, seed 0: last 54.3 %; 7 s a fold on one core
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import common
import data
import protocols
import rch

SETTINGS = {  # name: (paper preset, tiny preset); each is a flag
    "epochs_first": (60, 10),  # in the first session
    "epochs_next": (10, 3),  # in each later session
    "batch": (16, 32),
    "lr": (2e-5, 5e-4),
    "weight_decay": (0.05, 0.05),
}


def main():
    args = common.parse(__doc__, SETTINGS)
    pretrained = common.make_backbone(args)  # images (B, 3, S, S) -> features (B, d)
    sessions = data.load_sessions(args, pretrained)
    run = protocols.Run(args, sessions)

    for fold in run.folds:
        # ---- a trial begins: this fold of every session is its test part ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()  # which row means which emotion of which session
        backbone = copy.deepcopy(pretrained)
        heads = nn.ModuleList()
        test_images = []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0); train and test are indices ----
            new_rows = rows.add_session(session.emotions)  # a slice of all R rows
            x = session.images[train]  # (N, 3, S, S)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)
            test_images.append(session.images[test])

            # ---- grow ----
            heads.append(nn.Linear(backbone.num_features, len(session.emotions)).to(args.device))

            # ---- train ----
            losses = []
            epochs = args.epochs_next if t > 0 else args.epochs_first
            batches = common.batches(len(x), args.batch, epochs, args.device)  # indices (B,)
            trained = [*backbone.parameters(), *heads[-1].parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
            backbone.train()
            for batch in batches:
                with common.autocast(args):
                    logits = heads[-1](backbone(x[batch]))  # (B, emotions of the session)
                # A head counts its rows from 0.
                loss = F.cross_entropy(logits.float(), y[batch] - new_rows.start)
                losses.append(loss.detach())

                optimizer.zero_grad()
                loss.backward()

                optimizer.step()
                schedule.step()

            # ---- test on the test parts of all sessions so far ----
            backbone.eval()
            f = common.extract(backbone, torch.cat(test_images))  # (n, d)
            with torch.no_grad():
                scores = torch.cat([head(f) for head in heads], 1)  # (n, R)
            run.record(fold, t, rows, scores, losses)  # rows -> emotions -> accuracy
        run.save(fold, backbone=backbone, heads=heads)  # with --save
    run.summary()


if __name__ == "__main__":
    common.launch(main)
