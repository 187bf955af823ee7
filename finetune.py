"""Finetune: keep training the whole network on whatever comes, and watch it forget.

The simplest thing one can do, and the floor that every other method has to beat. When a session arrives, the backbone
and a new head for the session's rows are trained on it with cross-entropy; then the next session arrives. The old heads
stay as they are, but the features they were trained for move away under them: that is catastrophic forgetting.

A session's life
    grown     one linear head, one row per emotion of the session (a list of heads: literally the paper's H^t)
    trained   the backbone and the new head, on the session's own rows only
    frozen    the old heads
    tested    on all emotions so far: RCH merges the rows that mean the same emotion; what it adds is told in rch.py
What goes wrong without exemplars (samples of old sessions): rows of different sessions are never trained against each
other. Each session has a constant and a scale of its own, and in a sum the rows with the largest scale decide.

Paper: the benchmark, arXiv 2501.19111, section 3.4 ("Finetune" and the head)
Run:   python finetune.py --backbone vit --protocol ilcv

Differs from the paper / from the released code (1 to 5 also hold for the scripts that name them)
 1. The paper names no optimizer and hints at a schedule ("initial learning rate"). Here: AdamW, weight decay 0.05, and
    a cosine to 0 within each session, per batch. Released: SGD with momentum, weight decay 0.005, constant 2e-5.
 2. Images are stretched, normalised by the checkpoint's own mean and std (released: ImageNet's, for a ViT that
    expects 0.5), not augmented. Training on CUDA is bfloat16. An emotion without a training sample never wins.
 3. Heads start with nn.Linear's own random values. A last batch of one image is dropped (BatchNorm needs two).
 4. The last epoch is taken, as released: nothing is chosen on test data.
 5. The paper does not say which rows the loss runs over. Here and released: the session's own.
 6. Released: the backbone is frozen after session 1, its BatchNorm statistics drift, old biases become 0, and the
    script cannot start (a missing argument). Here everything is trained in every session; old heads do not change.
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
    "epochs_next": (10, 3),  # in each later one
    "batch": (16, 32),
    "lr": (2e-5, 5e-4),
    "weight_decay": (0.05, 0.05),
}


def main():
    args = common.parse(__doc__, SETTINGS)
    pretrained = common.make_backbone(args)  # images (B, 3, S, S) -> features (B, d), in eval mode
    sessions = data.load_sessions(args, pretrained)  # T of them: .images (N, 3, S, S), .labels (N,), .emotions
    run = protocols.Run(args, sessions)  # makes the folds; prints the lines, writes the files

    for fold in run.folds:  # those asked for, without those that are there already
        # ---- a trial begins: fold i of every session ----
        torch.manual_seed(args.seed * 1000 + fold)  # a fold is the same whatever folds ran before
        rows = rch.RCH()  # the rows so far, each a (session, emotion) pair
        backbone, heads = copy.deepcopy(pretrained), nn.ModuleList()
        test_images = []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0) ----
            new = rows.add_session(session.emotions)  # slice of the new rows among all R
            x = session.images[train]  # (N, 3, S, S); N is now the session's training samples
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,) the row of each sample
            test_images.append(session.images[test])

            # ---- grow ----
            heads.append(nn.Linear(backbone.num_features, len(session.emotions)).to(args.device))

            # ---- train ----
            epochs = args.epochs_next if t else args.epochs_first
            batches = common.batches(len(x), args.batch, epochs, args.device)  # of all epochs: shuffled indices (B,)
            trained = [*backbone.parameters(), *heads[-1].parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
            backbone.train()
            for batch in batches:
                with common.autocast(args):  # bfloat16, on CUDA only
                    logits = heads[-1](backbone(x[batch]))  # (B, emotions of the session)
                loss = F.cross_entropy(logits.float(), y[batch] - new.start)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

            # ---- test on the fold-i parts of all sessions so far ----
            backbone.eval()
            with torch.no_grad():
                f = common.extract(backbone, torch.cat(test_images))  # (n, d)
                scores = torch.cat([head(f) for head in heads], 1)  # (n, R)
            run.record(fold, t, rows, scores)  # merges the rows and prints the line; at the end writes the fold's file
    run.summary()


if __name__ == "__main__":
    common.launch(main)
