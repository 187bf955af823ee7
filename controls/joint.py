"""Joint: the upper bound. Keep all data, and train anew on everything in each session.

It breaks the rule that old data is gone, to show what the rule costs. In session t the network
starts again from the pretrained weights and is trained for epochs-first epochs on the training
parts of sessions 1 to t, with ONE row per emotion; for the last alone see controls/norch.py. (To
go on from the last session's weights, with rows for old samples, would be no upper bound.)
Run:   python -m controls.joint --backbone vit --protocol ilcv
       synthetic stream, seed 0: last 60.3 %; 30 s a fold on one core
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
    # And as many in every later one:
    "epochs_first": (60, 10),  # in the first session
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
        images, targets = [], []
        test_images = []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0); train and test are indices ----
            new_emotions = [emotion for emotion in session.emotions if emotion not in rows.emotions]
            rows.add_session(new_emotions)
            images.append(session.images[train])
            targets.append(torch.from_numpy(rows.targets(session.labels[train])).to(args.device))
            x = torch.cat(images)  # (N, 3, S, S) of all sessions so far
            y = torch.cat(targets)  # (N,)
            test_images.append(session.images[test])

            # ---- grow ----
            backbone = copy.deepcopy(pretrained)  # a new start
            head = nn.Linear(backbone.num_features, len(rows.emotions)).to(args.device)

            # ---- train ----
            losses = []
            batches = common.batches(len(x), args.batch, args.epochs_first, args.device)  # indices (B,)
            trained = [*backbone.parameters(), *head.parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
            backbone.train()
            for batch in batches:
                with common.autocast(args):
                    logits = head(backbone(x[batch]))  # (B, E)
                loss = F.cross_entropy(logits.float(), y[batch])
                losses.append(loss.detach())

                optimizer.zero_grad()
                loss.backward()

                optimizer.step()
                schedule.step()

            # ---- test on the test parts of all sessions so far ----
            backbone.eval()
            f = common.extract(backbone, torch.cat(test_images))  # (n, d)
            with torch.no_grad():
                scores = head(f)  # (n, E)
            run.record(fold, t, rows, scores, losses)  # rows -> emotions -> accuracy
        run.save(fold, backbone=backbone, head=head)  # with --save
    run.summary()


if __name__ == "__main__":
    common.launch(main)
