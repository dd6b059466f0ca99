"""Without a server: ``offline_engine.py MODEL [--recipe NAME|FILE]`` generates and says what ran in which precision."""

from __future__ import annotations

import argparse
import os

import sglang
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="auto")
    args = parser.parse_args()
    os.environ["MIXQUANT_RECIPE"] = args.recipe
    cpu = {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True, "max_total_tokens": 20000}
    engine = sglang.Engine(model_path=args.model, quantization="mixquant", **({} if torch.cuda.is_available() else cpu))
    prompt = "The tool returned: " + "status ok, retry later. " * 20 + "\nIn short:"
    answer = engine.generate(prompt, {"temperature": 0, "max_new_tokens": 16})
    state = engine.get_server_info()["internal_states"][0]["mixquant"]
    engine.shutdown()
    print(answer["text"])
    for phase, rows in state["tokens"].items():
        print(f"{phase}: " + ", ".join(f"{n} rows in {precision}" for precision, n in rows.items()))


if __name__ == "__main__":  # the engine starts processes, which import this file
    main()
