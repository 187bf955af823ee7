"""DER: give every session its own feature extractor, and keep all of them.

DER is Dynamically Expandable Representation. Each session after the first adds an extractor, a copy
of the last one; the older ones are frozen. One head reads the features of all extractors and scores
all rows so far. An auxiliary head reads the new extractor alone: its classes are the session's
emotions and one class "old", so that the new extractor learns features of its own.
    grown     one extractor; the head, by the new rows and d columns; a new auxiliary head
    trained   the new extractor and both heads: cross-entropy (CE) of both, over all rows
    frozen    the older extractors, in eval mode: their BatchNorm statistics do not change
    tested    on the test images of all sessions so far
There are no exemplars, so every target is a new row, and "old" is never one. On every image the CE
lowers the scores of old rows: the features are kept, but the head forgets.
Paper: Yan et al., arXiv 2103.16788. What differs: docs/differences.md
Run:   python der.py --backbone vit --protocol ilcv
       synthetic stream, seed 0: last 24.6 %; 8 s a fold on one core
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
    d = pretrained.num_features

    for fold in run.folds:
        # ---- a trial begins: this fold of every session is its test part ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()  # which row means which emotion of which session
        extractors = [copy.deepcopy(pretrained)]
        head = None
        test_images = []
        test_f = []  # per extractor, the features (n, d) of all test images so far

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0); train and test are indices ----
            new_rows = rows.add_session(session.emotions)  # a slice of all R rows
            x = session.images[train]  # (N, 3, S, S)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)
            test_images.append(session.images[test])

            # ---- grow ----
            old_head = head
            head = nn.Linear((t + 1) * d, new_rows.stop).to(args.device)
            aux_head = nn.Linear(d, len(session.emotions) + 1).to(args.device)  # class 0 is "old"
            if t > 0:
                extractors.append(copy.deepcopy(extractors[-1]))
                extractors[-2].requires_grad_(False)
                with torch.no_grad():
                    # Old rows get random weights for the new features, so their scores change.
                    head.weight[: new_rows.start, : t * d] = old_head.weight
                    head.bias[: new_rows.start] = old_head.bias
                # Frozen features do not change: they are computed once.
                frozen_f = [common.extract(extractor, x) for extractor in extractors[:-1]]
                old_f = torch.cat(frozen_f, 1)  # (N, t d)

            # ---- train ----
            losses = []
            epochs = args.epochs_next if t > 0 else args.epochs_first
            batches = common.batches(len(x), args.batch, epochs, args.device)  # indices (B,)
            trained = [*extractors[-1].parameters(), *head.parameters(), *aux_head.parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
            extractors[-1].train()
            for batch in batches:
                with common.autocast(args):
                    f = extractors[-1](x[batch])  # (B, d)
                    if t == 0:
                        logits = head(f)  # (B, R)
                    else:
                        logits = head(torch.cat([old_f[batch], f], 1))  # (B, R)
                        aux_logits = aux_head(f)  # (B, 1 + emotions of the session)
                loss = F.cross_entropy(logits.float(), y[batch])
                if t > 0:
                    aux_y = y[batch] - new_rows.start + 1  # the head's first new row is class 1
                    loss = loss + F.cross_entropy(aux_logits.float(), aux_y)
                losses.append(loss.detach())

                optimizer.zero_grad()
                loss.backward()

                optimizer.step()
                schedule.step()

            # ---- test on the test parts of all sessions so far ----
            extractors[-1].eval()  # for good: the next session freezes it
            # Of the frozen extractors the features of earlier test images are kept.
            for i in range(t):
                new_f = common.extract(extractors[i], test_images[-1])
                test_f[i] = torch.cat([test_f[i], new_f])
            test_f.append(common.extract(extractors[-1], torch.cat(test_images)))
            with torch.no_grad():
                scores = head(torch.cat(test_f, 1))  # (n, R)
            run.record(fold, t, rows, scores, losses)  # rows -> emotions -> accuracy
        run.save(fold, extractors=nn.ModuleList(extractors), head=head)  # with --save
    run.summary()


if __name__ == "__main__":
    common.launch(main)
