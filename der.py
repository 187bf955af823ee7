"""DER: give every session its own feature extractor, and keep all of them.

DER (Dynamically Expandable Representation) answers forgetting by never touching what was learned. When a session
arrives, a new extractor is added, starting as a copy of the last one; the older ones are frozen. An image is then
described by all extractors' features side by side, F(x) = [f_1(x), ..., f_t(x)], and one head over F scores all rows so
far. An auxiliary head on the new extractor alone, which must tell the session's emotions apart and from "old", pushes
it to see what the older ones do not.

A session's life
    grown     one extractor; the head, by the session's rows and by d columns; a new auxiliary head
    trained   the new extractor, the whole head, the auxiliary head
    frozen    the older extractors, in eval mode: their BatchNorm statistics rest too
    tested    on all emotions so far
What goes wrong without exemplars: the loss runs over all rows, but every sample belongs to the session. To old rows it
only says "not this one", and their scores fall: the features are all kept, the head forgets. This may be why the
paper's Table 2 has DER at about 20 % in session 2. "Old" in the auxiliary head never occurs.

Paper: Yan et al., DER, arXiv 2103.16788; in the benchmark: arXiv 2501.19111, section 3.4
Run:   python der.py --backbone vit --protocol ilcv

Differs from the paper / from the released code (and as finetune.py 1 to 4)
 1. Expansion only. DER's authors never released their pruning masks, and the benchmark has none.
 2. No second stage that balances the head: it needs exemplars. No weight alignment either, by choice.
 3. The head's old block and biases are copied, as in the public ports. DER's own code draws a head without
    bias anew, with 10 epochs of warm-up.
 4. Released: the loop that freezes the old extractors is gone, so all of them train, which is not DER.
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
    pretrained = common.make_backbone(args)  # images (B, 3, S, S) -> features (B, d)
    sessions = data.load_sessions(args, pretrained)
    run = protocols.Run(args, sessions)
    d = pretrained.num_features

    for fold in run.folds:
        # ---- a trial begins: fold i of every session ----
        torch.manual_seed(args.seed * 1000 + fold)
        rows = rch.RCH()
        extractors, head = [], None
        test_images, test_features = [], []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0) ----
            new = rows.add_session(session.emotions)
            x = session.images[train]  # (N, 3, S, S)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)
            test_images.append(session.images[test])

            # ---- grow ----
            for extractor in extractors:
                extractor.requires_grad_(False)
            extractors.append(copy.deepcopy(extractors[-1] if t else pretrained).requires_grad_(True))
            old_head, head = head, nn.Linear((t + 1) * d, new.stop).to(args.device)
            if t:  # old rows' new columns start at random, so old scores move
                with torch.no_grad():
                    head.weight[: new.start, : t * d] = old_head.weight
                    head.bias[: new.start] = old_head.bias
            aux_head = nn.Linear(d, len(session.emotions) + 1).to(args.device)  # 0 = old, then the session's emotions
            # Frozen extractors see each image once. Session 1 has none.
            old_f = [torch.empty(len(x), 0, device=args.device), *(common.extract(old, x) for old in extractors[:-1])]
            old_f = torch.cat(old_f, 1)  # (N, t d)

            # ---- train ----
            epochs = args.epochs_next if t else args.epochs_first
            batches = common.batches(len(x), args.batch, epochs, args.device)
            trained = [*extractors[-1].parameters(), *head.parameters(), *aux_head.parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
            extractors[-1].train()
            for batch in batches:
                with common.autocast(args):
                    f = extractors[-1](x[batch])  # (B, d)
                    logits = head(torch.cat([old_f[batch], f], 1))  # (B, R)
                    aux = aux_head(f)  # (B, emotions of the session + 1), unused in session 1
                loss = F.cross_entropy(logits.float(), y[batch])
                if t:
                    loss = loss + F.cross_entropy(aux.float(), y[batch] - new.start + 1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

            # ---- test on the fold-i parts of all sessions so far ----
            extractors[-1].eval()
            for s, extractor in enumerate(extractors[:-1]):  # they see the new test images; the others' f are kept
                test_features[s] = torch.cat([test_features[s], common.extract(extractor, test_images[-1])])
            test_features.append(common.extract(extractors[-1], torch.cat(test_images)))  # (n, d)
            with torch.no_grad():
                scores = head(torch.cat(test_features, 1))  # (n, R)
            run.record(fold, t, rows, scores)
    run.summary()


if __name__ == "__main__":
    common.launch(main)
