"""Train the small Qwen3 that quality is measured on: data made by code, torch and numpy alone, one GPU, minutes.

    scripts/train_tiny_model --prepare DATA                          where tokenizers and transformers are installed
    scripts/train_tiny_model DATA OUT --state FILE [--minutes 8]     on the GPU; writes a checkpoint, then measures it
    scripts/train_tiny_model DATA OUT --state FILE --resume          goes on where the state file ends
    scripts/train_tiny_model DATA OUT --init MODEL                   a further stage from a checkpoint, optimizer fresh
    scripts/train_tiny_model DATA MODEL --evaluate [--arms bf16 nvfp4 mixed]

A batch is a fixed number of tokens, packed documents of real text and of tasks (tiny_tasks.py), and a function of the
seed and the step alone. So a run that was cut short and resumed ends as one that was not. --steps fixes the schedule;
without it the learning rate starts to fall after 70 % of --minutes, and the line that says so names the flags that
repeat the run. Matrices inside the layers learn with Muon (Jordan et al. 2024: the momentum, orthogonalised by five
Newton-Schulz steps), the rest with Adam; masters are FP32, the model that is trained and saved is BF16.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before torch: cuBLAS is deterministic with it

import torch

from scripts.models.checkpoint import read_checkpoint, write_checkpoint
from scripts.models.evaluation import evaluate
from scripts.models.tiny_model import Shape
from scripts.models.tiny_tasks import LENGTHS, LEVELS, TASKS
from scripts.models.tiny_text import END_OF_TEXT, IM_END
from scripts.models.training import train
from scripts.models.training_data import LONGEST, Data, prepare


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="what --prepare wrote")
    parser.add_argument("out", type=Path, nargs="?", help="the checkpoint's folder")
    parser.add_argument("--prepare", type=Path, metavar="DATA", help="write the data folder and end")
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint in OUT and end")
    parser.add_argument("--state", type=Path, help="file for optimizer and step, about 130 MB; saved every 2 minutes")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--init", type=Path, help="start from a checkpoint's weights")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the whole schedule (default: what fits into --minutes)")
    parser.add_argument("--decay-from", type=int, help="step where the rate starts to fall (default: 0.7 of --steps)")
    parser.add_argument("--keep-rate", action="store_true", help="no decay: a later stage follows")
    parser.add_argument("--seed", type=int, default=20260117)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--longest", type=int, default=LONGEST, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--ramp", type=int, default=1500, help="steps until prompts have full length")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--adam-rate", type=float, default=0.003)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--decay", type=float, default=0.05, help="weight decay of the matrices")
    parser.add_argument("--workers", type=int, default=max(0, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--compile", action="store_true", help="torch.compile of the parts around attention")
    parser.add_argument("--nondeterministic", dest="deterministic", action="store_false")
    parser.add_argument("--arms", nargs="+", choices=("bf16", "nvfp4", "mixed"), default=["bf16"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--levels", nargs="+", type=int, choices=range(3), default=[1, 0, 2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[LENGTHS[0], LENGTHS[2]])
    parser.add_argument("--n", type=int, default=128, help="problems of each row")
    parser.add_argument("--shape", default="{}", help="JSON over the model's dimensions, for tests")
    args = parser.parse_args(argv)
    if not args.prepare and not (args.data and args.out):
        parser.error("DATA and OUT are needed, or --prepare DATA")
    if args.resume and not (args.state and args.state.is_file()):
        parser.error(f"--resume needs the file of an earlier run as --state; got {args.state}")
    assert all(len(levels) == 3 for levels in LEVELS.values())
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.prepare:
        prepare(args.prepare)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.evaluate:
        shape, weights = read_checkpoint(args.out)
        rows = evaluate(args, shape, weights, device)
        print(json.dumps(rows))
        return 0
    shape = Shape(**json.loads(args.shape))
    trainer, log, done = train(args, shape, Data(args.data), device)
    weights = trainer.bf16_weights()
    write_checkpoint(args.out, shape, weights, END_OF_TEXT, IM_END)
    for file in (args.data / "tokenizer").iterdir():
        (args.out / file.name).write_bytes(file.read_bytes())
    (args.out / "training.json").write_text(json.dumps(log) + "\n")
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.1f} MB", flush=True)
    if args.n:
        rows = evaluate(args, shape, weights, device)
        (args.out / "training.json").write_text(json.dumps([*log, *rows]) + "\n")
    return 0 if done or args.keep_rate else 3


def command() -> None:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the worker processes too
    sys.exit(main())
