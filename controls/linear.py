"""Linear: a linear head on the frozen pretrained network, for every backbone.

What prompts and adaptation are held against: without it nobody knows what they add. The network
never changes, so every image's features are computed once; the heads are L2P's, one per session,
trained on the session's own rows with Adam at a learning rate of their own.
Run:   python -m controls.linear --backbone vit --protocol ilcv
       synthetic stream, seed 0: last 52.5 %; 1 s a fold on one core
"""

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
    "batch": (16, 16),
    "lr": (1e-3, 1e-2),
}


def main():
    args = common.parse(__doc__, SETTINGS)
    pretrained = common.make_backbone(args)  # images (B, 3, S, S) -> features (B, d)
    sessions = data.load_sessions(args, pretrained)
    run = protocols.Run(args, sessions)
    features = {session.name: common.extract(pretrained, session.images) for session in sessions}  # (N, d) each

    for fold in run.folds:
        # ---- a trial begins: this fold of every session is its test part ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()  # which row means which emotion of which session
        heads = nn.ModuleList()
        test_f = []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0); train and test are indices ----
            new_rows = rows.add_session(session.emotions)  # a slice of all R rows
            x = features[session.name][train]  # (N, d)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)
            test_f.append(features[session.name][test])

            # ---- grow ----
            heads.append(nn.Linear(pretrained.num_features, len(session.emotions)).to(args.device))

            # ---- train ----
            losses = []
            epochs = args.epochs_next if t > 0 else args.epochs_first
            batches = common.batches(len(x), args.batch, epochs, args.device)  # indices (B,)
            trained = [*heads[-1].parameters()]
            optimizer = torch.optim.Adam(trained, args.lr, fused=True)
            for batch in batches:
                logits = heads[-1](x[batch])  # (B, emotions of the session)
                # A head counts its rows from 0.
                loss = F.cross_entropy(logits, y[batch] - new_rows.start)
                losses.append(loss.detach())

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)

                optimizer.step()

            # ---- test on the test parts of all sessions so far ----
            f = torch.cat(test_f)  # (n, d)
            with torch.no_grad():
                scores = torch.cat([head(f) for head in heads], 1)  # (n, R)
            run.record(fold, t, rows, scores, losses)  # rows -> emotions -> accuracy
        run.save(fold, heads=heads)  # with --save
    run.summary()


if __name__ == "__main__":
    common.launch(main)
