"""FOSTER: let a second network learn what the first gets wrong, then compress both into one.

Boosting: the old network and its head (scores z_old) are frozen. A new network, a copy of the old,
gets two heads: one on the features of both (z), one on its own alone (z_new). The loss is
CE(z, y) + CE(z_new, y) + KD(z[old rows], z_old), with cross-entropy CE and distillation KD.
Compression: both networks and the head on both are the teacher, frozen. The student, another copy
of the old network and its head with new rows added, is trained without labels: KD(student, z).
The next session starts from the student, so one network is kept, where DER keeps all. Session 1
trains one network by CE. Tested on the test images of all sessions so far is the teacher, as in the
original, and beside it the student.
There are no exemplars: the CE lowers the scores of old rows, as in DER. KD keeps the differences
among old rows, not their level against new ones, and it sees images of this session alone.
Paper: Wang et al., arXiv 2204.04662. What differs: docs/differences.md
Run:   python foster.py --backbone vit --protocol ilcv
       synthetic stream, seed 0: last 23.4 %; 12 s a fold on one core
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
    # Of boosting, and as many again of compression:
    "epochs_next": (10, 3),  # in each later session
    "batch": (16, 32),
    "lr": (2e-5, 5e-4),
    "weight_decay": (0.05, 0.05),
}


def distillation(scores, teacher_scores, temperature=2):
    """KD(scores, teacher_scores), (B, R) each: the mean cross-entropy of softmax(scores / T) to the
    targets softmax(teacher_scores / T), T the temperature; without a factor T^2, as the original."""
    return F.cross_entropy(scores / temperature, F.softmax(teacher_scores / temperature, 1))


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
        student, student_head = pretrained, None  # session 1 starts here, without a head
        student_test_f = None  # (n, d) of all test images so far
        test_images = []

        for t, session, train, test in run.stream(fold):
            # ---- session t arrives (session 1 is t = 0); train and test are indices ----
            new_rows = rows.add_session(session.emotions)  # a slice of all R rows
            x = session.images[train]  # (N, 3, S, S)
            y = torch.from_numpy(rows.targets(session.labels[train])).to(args.device)  # (N,)
            test_images.append(session.images[test])

            # ---- grow ----
            old, old_head = student, student_head
            backbone = copy.deepcopy(old).requires_grad_(True)  # the new network
            head = nn.Linear(d if t == 0 else 2 * d, new_rows.stop).to(args.device)
            new_head = nn.Linear(d, new_rows.stop).to(args.device)  # on the new features alone
            if t > 0:
                old_f = common.extract(old, x)  # (N, d)
                with torch.no_grad():
                    # Old rows get random weights for the new features, so their scores change.
                    head.weight[: new_rows.start, :d] = old_head.weight
                    head.bias[: new_rows.start] = old_head.bias
                    old_scores = old_head(old_f)  # z_old, (N, old rows)

            # ---- train ----
            losses, student_losses = [], []
            epochs = args.epochs_next if t > 0 else args.epochs_first
            batches = common.batches(len(x), args.batch, epochs, args.device)  # indices (B,)
            trained = [*backbone.parameters(), *head.parameters(), *new_head.parameters()]
            optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
            backbone.train()
            for batch in batches:
                with common.autocast(args):
                    f = backbone(x[batch])  # (B, d)
                    if t == 0:
                        logits = head(f)  # (B, R)
                    else:
                        logits = head(torch.cat([old_f[batch], f], 1))  # z, (B, R)
                        new_logits = new_head(f)  # z_new, (B, R)
                loss = F.cross_entropy(logits.float(), y[batch])
                if t > 0:
                    loss = loss + F.cross_entropy(new_logits.float(), y[batch])
                    old_logits = logits[:, : new_rows.start]
                    loss = loss + distillation(old_logits.float(), old_scores[batch])
                losses.append(loss.detach())

                optimizer.zero_grad()
                loss.backward()

                optimizer.step()
                schedule.step()
            backbone.eval().requires_grad_(False)

            # ---- compress ----
            if t == 0:  # one network: nothing to compress
                student, student_head = backbone, head
            else:
                both_f = torch.cat([old_f, common.extract(backbone, x)], 1)  # (N, 2 d)
                student = copy.deepcopy(old).requires_grad_(True)
                student_head = nn.Linear(d, new_rows.stop).to(args.device)
                with torch.no_grad():
                    teacher_scores = head(both_f)  # (N, R)
                    student_head.weight[: new_rows.start] = old_head.weight
                    student_head.bias[: new_rows.start] = old_head.bias
                batches = common.batches(len(x), args.batch, epochs, args.device)  # indices (B,)
                trained = [*student.parameters(), *student_head.parameters()]
                optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0, fused=True)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
                student.train()
                for batch in batches:
                    with common.autocast(args):
                        logits = student_head(student(x[batch]))  # (B, R)
                    loss = distillation(logits.float(), teacher_scores[batch])
                    student_losses.append(loss.detach())

                    optimizer.zero_grad()
                    loss.backward()

                    optimizer.step()
                    schedule.step()
                student.eval().requires_grad_(False)

            # ---- test on the test parts of all sessions so far ----
            all_test = torch.cat(test_images)
            old_test_f = student_test_f  # the old network is the last session's student
            student_test_f = common.extract(student, all_test)  # (n, d)
            with torch.no_grad():
                student_scores = student_head(student_test_f)  # (n, R)
            if t == 0:
                scores = student_scores  # there is no teacher yet
            else:
                old_test_f = torch.cat([old_test_f, common.extract(old, test_images[-1])])  # (n, d)
                both_f = torch.cat([old_test_f, common.extract(backbone, all_test)], 1)  # (n, 2 d)
                with torch.no_grad():
                    scores = head(both_f)  # (n, R)
            student_results = (student_scores, student_losses)
            run.record(fold, t, rows, scores, losses, student=student_results)  # rows -> emotions -> accuracy
        run.save(fold, old=old, backbone=backbone, head=head, student=student, student_head=student_head)  # with --save
    run.summary()


if __name__ == "__main__":
    common.launch(main)
