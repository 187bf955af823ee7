"""No RCH: Finetune with one row per emotion. A head that grows only when a new emotion appears.

All else is finetune.py; the loss runs over the rows of the session's own emotions.
Run:   python -m controls.norch --backbone vit --protocol ilcv
       synthetic stream, seed 0: last 56.3 %; 7 s a fold on one core
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
    run = protocols.Run(args, sessions, merges=("sum",))  # one row per emotion: there is nothing to merge

    for fold in run.folds:
        # ---- a trial begins: this fold of every session is its test part ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()  # which row means which emotion of which session
        backbone = copy.deepcopy(pretrained)
        heads = nn.ModuleList()
        test_images = []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0); train and test are indices ----
            new_emotions = [emotion for emotion in session.emotions if emotion not in rows.emotions]
            new_rows = rows.add_session(new_emotions)  # a slice of all R rows
            x = session.images[train]  # (N, 3, S, S)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)
            test_images.append(session.images[test])

            # ---- grow ----
            if new_emotions:
                heads.append(nn.Linear(backbone.num_features, len(new_emotions)).to(args.device))
            outside = torch.full((new_rows.stop,), -torch.inf, device=args.device)  # (E,)
            outside[rows.targets(session.emotions)] = 0

            # ---- train ----
            losses = []
            epochs = args.epochs_next if t > 0 else args.epochs_first
            batches = common.batches(len(x), args.batch, epochs, args.device)  # indices (B,)
            trained = [*backbone.parameters(), *heads.parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
            backbone.train()
            for batch in batches:
                with common.autocast(args):
                    f = backbone(x[batch])  # (B, d)
                    logits = torch.cat([head(f) for head in heads], 1)  # (B, E)
                loss = F.cross_entropy(logits.float() + outside, y[batch])
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
