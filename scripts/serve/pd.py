"""A prefill server and a decode server on GPUs of their own behind SGLang's router, which has the OpenAI endpoint.

    scripts/serve_pd MODEL [--prefill-gpu 0 --decode-gpu 1 --tp N --port 8595]
    scripts/serve_pd MODEL --decode stock -- --mem-fraction-static 0.8

Starts all three, sends one token through them, prints the endpoint, and watches.  Ctrl-C, a signal, or the end of one
of them stops them all; of one that ended by itself the log's last lines are shown, and the exit status is 1.  Without a
GPU both servers run on the CPU.  What a pair promises: docs/pd.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from scripts.serve.libraries import MissingLibraries
from scripts.serve.pair import ROUTERS, Pair, Plan, gpus_of, states
from scripts.serve.processes import Ended

ROOT = Path(__file__).resolve().parents[2]


def gpu_count() -> int:
    """Asked of the driver, so that this process takes no CUDA context."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


def parse(argv: list[str]) -> Plan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a BF16 checkpoint: a folder, or its name on the hub")
    add("--prefill-gpu", type=int, default=0, help="the first GPU of the prefill server (default: %(default)s)")
    add("--decode-gpu", type=int, help="the first GPU of the decode server (default: the one after those of prefill)")
    add("--tp", type=int, default=1, help="GPUs of each server (default: %(default)s)")
    add("--host", default="127.0.0.1", help="of all three (default: %(default)s)")
    add("--port", type=int, default=8595, help="of the router (default: %(default)s)")
    add("--recipe", default="", help="a shipped recipe or a recipe file (default: auto)")
    add("--decode", choices=("mixquant", "stock"), default="mixquant", help="the decode server (default: %(default)s)")
    add("--transfer", help="SGLang's transfer back end (default: nixl, mooncake_tcp on a CPU)")
    add(
        "--router",
        choices=ROUTERS,
        default="mini",
        help="sglang-router's mini_lb, or its router in Rust, which drops custom_params (default: %(default)s)",
    )
    add("--prefill-flags", default="", help="more flags for the prefill server, in one string")
    add("--decode-flags", default="", help="more flags for the decode server, in one string")
    parser.epilog = "Behind --: more flags for both servers."
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    if not 0 < args.port < 2**16:
        parser.error("argument --port: 1 to 65535")
    gpus = gpu_count()
    decode_gpu = args.prefill_gpu + args.tp if args.decode_gpu is None else args.decode_gpu
    if args.tp < 1:
        parser.error("argument --tp: at least 1")
    if gpus and abs(args.prefill_gpu - decode_gpu) < args.tp:
        parser.error("arguments --prefill-gpu, --decode-gpu, --tp: the two servers would share a GPU")
    if gpus and max(args.prefill_gpu, decode_gpu) + args.tp > gpus:
        parser.error(f"arguments --prefill-gpu, --decode-gpu, --tp: there are {gpus} GPUs")
    if not gpus and args.decode == "stock":
        parser.error("argument --decode: stock SGLang does not start on a CPU; use mixquant")
    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    recipe = str(Path(args.recipe).resolve()) if args.recipe and Path(args.recipe).is_file() else args.recipe
    return Plan(
        model,
        args.port,
        recipe=recipe,
        decode=args.decode,
        prefill_gpu=gpus_of(args.prefill_gpu, args.tp) if gpus else "",
        decode_gpu=gpus_of(decode_gpu, args.tp) if gpus else "",
        tp=args.tp,
        transfer=args.transfer or ("nixl" if gpus else "mooncake_tcp"),
        router=args.router,
        host=args.host,
        both=tuple(more),
        prefill_flags=tuple(args.prefill_flags.split()),
        decode_flags=tuple(args.decode_flags.split()),
    )


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    plan = parse(sys.argv[1:])
    logs = ROOT / ".cache"
    logs.mkdir(exist_ok=True)
    # A plain kill and a closed terminal unwind as Ctrl-C does, through Pair.__exit__.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with Pair(plan, logs, say) as pair:
            servers = {name: plan.url(name) for name in ("prefill", "decode")}
            for name, state in zip(servers, states(list(servers.values())), strict=True):
                say(f"{name}: {servers[name]} {json.dumps(state.get('precision', 'stock SGLang'))}")
            say(f"ready: {pair.url}/v1 (Ctrl-C stops all)")
            while True:
                for process in pair.processes.values():
                    process.check()
                time.sleep(0.5)
    except (Ended, MissingLibraries) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130


def command() -> None:
    sys.exit(main())
