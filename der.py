"""DER: give every session its own feature extractor, and keep all of them.

DER (Dynamically Expandable Representation) answers forgetting by never touching what was learned. When a session
arrives, a new extractor is added, starting as a copy of the last one; the older ones are frozen. Pictures are then
described by all extractors' features side by side, F(x) = [f_1(x), ..., f_t(x)], and one head over F scores all rows so
far. An auxiliary head on the new extractor alone, which must tell the session's emotions apart and from "old", pushes
it to see what the older ones do not.

A session's life
    grown     one extractor; the head by the session's rows and by d columns (old block and biases are copied);
              a fresh auxiliary head
    trained   the new extractor, the whole head, the auxiliary head
    frozen    the older extractors, in eval mode: their BatchNorm statistics rest too
    tested    on all emotions so far: RCH merges the rows that mean the same emotion (rch.py)

What RCH adds: a returning emotion keeps its old row, with whatever the old extractors still say, beside the new one.
What goes wrong without exemplars: the loss runs over all rows, but every sample belongs to the session. Old rows only
ever hear "not this one" and collapse: the features are all kept, the head forgets. This is why the paper's Table 2 has
DER fall to about 20 % in session 2. It is a lesson about the head, not a bug. "Old" in the auxiliary head never occurs.

Paper: Yan et al., DER, arXiv 2103.16788; in the benchmark: arXiv 2501.19111, section 5.
Run:   python der.py --backbone vit --protocol ilcv

Differs from the paper / from the released code
 1. Expansion only. DER's authors never released their pruning masks, and the benchmark has none.
 2. No exemplars, so no second stage that balances the head on them, and no weight alignment that needs them.
 3. The released code deleted the loop that freezes the old extractors: there, all of them train, which is not DER. Here
    they are bitwise unchanged, and since their features are constants, they are computed once per session.
 4. AdamW with a cosine and weight decay 0.05, where the benchmark's paper names no optimizer; the released code takes
    SGD with momentum, weight decay 0.005 and a constant 2e-5, which hardly moves the network.
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
    parser = common.parser(__doc__, SETTINGS)
    args = common.parse(parser, SETTINGS)
    sessions = common.load_sessions(args)  # T data.Session: name, images, emotions, subjects
    images = [torch.from_numpy(session.images).to(args.device) for session in sessions]  # (N, 3, S, S) uint8 each
    pretrained = common.make_backbone(args)  # pictures (B, 3, S, S) -> features (B, d), in eval mode
    d = pretrained.num_features
    run = protocols.Run(args, sessions)  # makes the folds; prints the lines, writes the files
    common.estimate(args, pretrained, sessions, run)  # only says how long the paper preset takes on a CPU

    for fold in run.folds:  # those asked for, without those that --resume keeps
        # ---- a trial begins: fold i of every session ----
        common.seed(args, fold)  # so that a fold is the same in any company
        rows = rch.RCH()  # the rows so far, each a (session, emotion) pair
        extractors, head = [], None
        test_images, test_features = [], []

        for t, session in enumerate(sessions):
            # ---- session t arrives (session 1 is t = 0) ----
            train, test = run.parts(fold, t)  # indices into the session's samples
            emotions = data.TABLE1[session.name]  # the session's 5 to 7 words
            new = rows.add_session(emotions)  # slice of the new rows among all R
            x = images[t][train]  # (N, 3, S, S) uint8; N is now the session's training samples
            y = torch.from_numpy(rows.targets(session.emotions)[train]).to(args.device)  # (N,) the row of each sample
            test_images.append(images[t][test])

            # ---- grow ----
            for extractor in extractors:
                extractor.requires_grad_(False)
            extractors.append(copy.deepcopy(extractors[-1] if t else pretrained).requires_grad_(True))
            old_head, head = head, nn.Linear((t + 1) * d, new.stop, device=args.device)
            if t:  # the old block and biases are copied; old rows' new columns start at random, so old scores move
                with torch.no_grad():
                    head.weight[: new.start, : t * d] = old_head.weight
                    head.bias[: new.start] = old_head.bias
            aux_head = nn.Linear(d, len(emotions) + 1, device=args.device)  # 0 = old, then the session's emotions
            nothing = torch.empty(len(x), 0, device=args.device)  # session 1 has no old extractor
            old_f = torch.cat([nothing, *(common.extract(old, x, args) for old in extractors[:-1])], 1)  # (N, t d)

            # ---- train ----
            epochs = args.epochs_next if t else args.epochs_first
            trained = [*extractors[-1].parameters(), *head.parameters(), *aux_head.parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            steps = epochs * common.steps_per_epoch(len(x), args.batch)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            extractors[-1].train()
            for epoch in range(epochs):
                for batch in common.batches(len(x), args.batch, args.device):  # shuffled indices (B,)
                    with common.autocast(args):  # bfloat16, on CUDA only
                        f = extractors[-1](common.normalize(x[batch], args))  # (B, d)
                        logits = head(torch.cat([old_f[batch], f], 1))  # (B, R)
                        aux = aux_head(f)  # (B, emotions of the session + 1), unused in session 1
                    loss = F.cross_entropy(logits.float(), y[batch])
                    if t:
                        loss = loss + F.cross_entropy(aux.float(), y[batch] - new.start + 1)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                common.check_finite(loss, fold, session.name, epoch)  # stops a run that has diverged

            # ---- test on the fold-i parts of all sessions so far ----
            # extract: in batches, from uint8, in float32, without gradients.
            # Old extractors see only the new test images: what they said of the earlier ones is kept.
            extractors[-1].eval()
            for s, extractor in enumerate(extractors[:-1]):
                test_features[s] = torch.cat([test_features[s], common.extract(extractor, test_images[-1], args)])
            test_features.append(common.extract(extractors[-1], torch.cat(test_images), args))  # (n, d)
            with torch.no_grad():
                scores = head(torch.cat(test_features, 1))  # (n, R)
            # Merges the rows, prints the line; after the last session writes the fold's file.
            run.record(fold, t, rows, scores.cpu())
    run.summary()  # of all finished folds of this run


if __name__ == "__main__":
    common.launch(main)
