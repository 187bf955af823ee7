"""Finetune: keep training the whole network on whatever comes, and watch it forget.

The simplest thing one can do, and the floor that every other method has to beat. When a session arrives, the backbone
and a fresh head for the session's rows are trained on it with cross-entropy; then the next session arrives. Nothing
holds the backbone to what it knew. The old heads are kept as they are, but the features they were trained for move
away under them: accuracy on old sessions decays although no old weight in the head has changed. That is catastrophic
forgetting.

A session's life
    grown     one linear head, one row per emotion of the session (a list of heads: literally the paper's H^t)
    trained   the backbone and the new head, on the session's own rows only
    frozen    the old heads
    tested    on all emotions so far: RCH merges the rows that mean the same emotion (rch.py)

What RCH adds: an emotion that returns in a new domain gets a new row, so the old row is not pulled over to the new
domain. What goes wrong without exemplars: rows of different sessions were never trained against each other. Each
session has a constant of its own and a scale of its own (the summary prints the sizes), and the loudest one wins.
Merging by "centered" takes out the constants (protocols.py --details); nothing takes out the scales.

Two controls that the paper lacks
    --joint   the upper bound: in every session start anew from the initial weights and train on the data of all
              sessions so far, with one row per emotion. It breaks the rule that old data is gone, to show what the
              rule costs.
    --no-rch  RCH's control: one head with one row per emotion, which grows only when a new emotion appears.

Paper: the benchmark, arXiv 2501.19111, section 5 ("Finetune"); the head: section 4.
Run:   python finetune.py --backbone vit --protocol ilcv

Differs from the paper / from the released code
 1. The paper names no optimizer and no schedule. Here: AdamW, weight decay 0.05, cosine to 0 within each session. The
    released code takes SGD with momentum, weight decay 0.005 and a constant 2e-5, which hardly moves the network.
 2. The released code freezes the backbone after session 1, but leaves its BatchNorm statistics drifting. Here
    everything is trained in every session, which is what the word means.
 3. The released code sets the biases of old rows to 0 when the head grows. Here old heads are bitwise unchanged.
 4. The released finetune cannot start: a missing argument.
 5. The paper does not say which rows the loss runs over. Here, as in the released code: the session's own.
 6. Pictures are normalised with the checkpoint's own mean and std. The released code feeds ImageNet's to a ViT that
    expects 0.5.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import common
import data
import protocols
import rch

# ---- settings --------------------------------------------------------------------------------------------------------
SETTINGS = {  # (paper preset, tiny preset)
    "epochs_first": (60, 10),
    "epochs_next": (10, 3),
    "batch": (16, 32),
    "lr": (2e-5, 5e-4),
    "weight_decay": (0.05, 0.05),
}


# ---- the run ---------------------------------------------------------------------------------------------------------
def main():
    parser = common.parser(__doc__, SETTINGS, protocols=("ilcv", "slcv", "loso"))
    control = parser.add_mutually_exclusive_group()
    control.add_argument("--joint", action="store_true", help="upper bound: retrain on all sessions so far")
    control.add_argument("--no-rch", action="store_true", help="one row per emotion, not per session and emotion")
    args = common.parse(parser, SETTINGS)
    args.variant = "joint" if args.joint else "no-rch" if args.no_rch else ""
    sessions = common.load_sessions(args)  # T data.Session: name, images, emotions, subjects
    images = [torch.from_numpy(session.images).to(args.device) for session in sessions]  # (N, 3, S, S) uint8 each
    pretrained = common.make_backbone(args)  # pictures (B, 3, S, S) -> features (B, d), in eval mode
    run = protocols.Run(args, sessions)  # makes the folds; prints the lines, writes the files
    common.estimate(args, pretrained, sessions, run)  # only says how long the paper preset takes on a CPU

    for fold in run.folds:  # those asked for, without those that --resume keeps
        # ---- a trial begins: fold i of every session ----
        common.seed(args, fold)  # so that a fold is the same in any company
        rows = rch.RCH()  # the rows so far, each a (session, emotion) pair
        backbone = copy.deepcopy(pretrained)
        heads = nn.ModuleList()
        test_images, seen = [], []

        for t, session in enumerate(sessions):
            # ---- session t arrives (session 1 is t = 0) ----
            train, test = run.parts(fold, t)  # indices into the session's samples
            emotions = data.TABLE1[session.name]  # the session's 5 to 7 words
            if args.joint or args.no_rch:  # the controls have one row per emotion
                new = rows.add_session([emotion for emotion in emotions if emotion not in rows.emotions])
            else:
                new = rows.add_session(emotions)  # slice of the new rows among all R
            x = images[t][train]  # (N, 3, S, S) uint8; N is now the session's training samples
            y = torch.from_numpy(rows.targets(session.emotions)[train]).to(args.device)  # (N,) the row of each sample
            test_images.append(images[t][test])

            # ---- grow ----
            if args.joint:  # start over, with the training parts of all sessions so far
                seen.append((x, y))
                x, y = (torch.cat(parts) for parts in zip(*seen))
                backbone, heads, new = copy.deepcopy(pretrained), nn.ModuleList(), slice(0, len(rows.emotions))
            if new.stop > new.start:  # without RCH, a session of old emotions adds no row
                heads.append(nn.Linear(backbone.num_features, new.stop - new.start, device=args.device))
            # The loss is over the session's rows only: -inf is added to the others. --joint trains all of them.
            outside = torch.full((len(rows.row_emotion),), -torch.inf, device=args.device)  # (R,)
            outside[slice(None) if args.joint else rows.targets(emotions)] = 0

            # ---- train ----
            epochs = args.epochs_first if t == 0 or args.joint else args.epochs_next
            trained = [*backbone.parameters(), *(heads if args.no_rch else heads[-1]).parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            steps = epochs * common.steps_per_epoch(len(x), args.batch)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            backbone.train()
            for epoch in range(epochs):
                for batch in common.batches(len(x), args.batch, args.device):  # shuffled indices (B,)
                    with common.autocast(args):  # bfloat16, on CUDA only
                        f = backbone(common.normalize(x[batch], args))  # (B, d)
                        logits = torch.cat([head(f) for head in heads], 1)  # (B, R)
                    loss = F.cross_entropy(logits.float() + outside, y[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                common.check_finite(loss, fold, session.name, epoch)  # stops a run that has diverged

            # ---- test on the fold-i parts of all sessions so far ----
            # extract: in batches, from uint8, in float32, without gradients.
            backbone.eval()
            with torch.no_grad():
                f = common.extract(backbone, torch.cat(test_images), args)  # (n, d)
                scores = torch.cat([head(f) for head in heads], 1)  # (n, R)
            # Merges the rows, prints the line; after the last session writes the fold's file.
            run.record(fold, t, rows, scores.cpu())
    run.summary()  # of all finished folds of this run


if __name__ == "__main__":
    common.launch(main)
