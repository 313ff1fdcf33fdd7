"""Scores a second of an 80M-parameter Gemma 2 on CPU, ours beside lm-eval with transformers, interleaved.

python -m tests.bench.evaluate_speed DATA PYTHON [--rounds 2] [--rows piqa,hellaswag] [--tokenizer MODEL]

DATA is a folder with the benchmarks' files; PYTHON an interpreter with torch, transformers and lm-eval, whose `HFLM`
gets the same token ids, at its best batch size of 1 and 8. Each contender is a process of its own on two cores. Random
weights of one folder, float32; of both every log-probability is compared. Compiling, loading of weights and
each program's first run are not counted; ids of Gemma's tokenizer are folded into the vocabulary of 32,000.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.serve_speed import SIZES, TOP

DOCUMENTS = {"piqa": 120, "hellaswag": 8, "hellaswag_0": 40, "boolq": 32, "mmlu": 40, "arc_challenge": 6}
TOKENIZER = TOP.parent / "shared" / "data" / "tokenizer" / "gemma2.model"
BLOCK = 1024


def write_requests(data: Path, row: str, tokenizer: Path, path: Path) -> None:
    from gemma.text import tokenizer as tokenizers
    from orchestrator.evaluation import requests, tasks

    coder = tokenizers.load(str(tokenizer))
    found = []
    for part in tasks.open_parts(tasks.read_row(row.removesuffix("_0")), data)[:2]:
        if row.endswith("_0"):
            part.task.set_config(key="num_fewshot", value=0)
        limit = max(2, DOCUMENTS[row] // 2) if row == "mmlu" else DOCUMENTS[row]
        part.task.build_all_requests(limit=limit)
        pairs = [instance.args for instance in part.task.instances]
        documents = [instance.doc_id for instance in part.task.instances]
        for (request, _), doc in zip(requests.encode_pairs(pairs, coder), documents, strict=True):
            tokens = [token if token < 4 else 4 + token % (SIZES["vocab"] - 4) for token in request.tokens]
            found.append({"part": part.name, "doc": doc, "tokens": tokens, "cut": request.cut})
    path.write_text(json.dumps(found))


def ours(weights: Path, path: Path) -> dict[str, Any]:
    from dataclasses import replace

    from gemma.batching import rows
    from gemma.config import Mesh
    from gemma.score.scorer import Scorer
    from gemma.weights.hf import open_hf
    from tests.test_config import config_of
    from tests.test_score import evaluating

    tasks: dict[str, dict[int, list[rows.Request]]] = {}
    for one in json.loads(path.read_text()):
        request = rows.Request(tuple(one["tokens"]), one["cut"])
        tasks.setdefault(one["part"], {}).setdefault(one["doc"], []).append(request)
    plan = rows.make_plan([list(documents.values()) for documents in tasks.values()], BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        rows.save(plan, Path(folder) / rows.FILE)
        made = config_of()
        train = replace(made.train, dtype="float32")
        program = replace(
            made.program, model=open_hf(weights).model, mesh=Mesh(1, 1, 1), train=train, evaluate=evaluating(weights)
        )
        scorer = Scorer(program, Path(folder), Path(folder) / "cache")
        scorer.restore(0, plan.digest())
        steps = rows.steps(plan, range(plan.blocks), 1)
        scorer.score(list({tuple(plan.shapes[step[0]]): step for step in steps}.values()))  # each program once
        began = time.perf_counter()
        answers = scorer.score(steps)
        seconds = time.perf_counter() - began
    found = {}
    for one in answers:
        found |= dict(zip(plan.requests_of(one.block), one.found, strict=True))
    computed = len(plan.tokens) + len(plan.prefix)
    slots = int(sum(width * size for _, width, size, _ in plan.shapes))
    return {
        "seconds": seconds,
        "values": [found[n][0] for n in range(len(found))],
        "computed": computed,
        "fill": len(plan.tokens) / slots,
    }


PEER = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from lm_eval.models.huggingface import HFLM
torch.set_num_threads(2)
weights, path, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])

model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation="eager").eval()
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 3}, unk_token="<unk>")),
    bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=8192)
wanted = json.load(open(path))
given = []
for one in wanted:
    context, rest = one["tokens"][: one["cut"]], one["tokens"][one["cut"] :]
    given.append(((" ".join(map(str, context)), " ".join(map(str, rest))), context, rest))
lm._loglikelihood_tokens(given[:2], disable_tqdm=True)
began = time.perf_counter()
found = lm._loglikelihood_tokens(given, disable_tqdm=True)
print(json.dumps({"seconds": time.perf_counter() - began, "values": [value for value, _ in found]}))
"""


def peer(python: str, weights: Path, path: Path, batch: int) -> dict[str, Any]:
    found = subprocess.run(
        [python, "-c", PEER, str(weights), str(path), str(batch)], stdout=subprocess.PIPE, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return answer


def mine(weights: Path, path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.evaluate_speed", "--ours", str(weights), str(path)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=TOP)
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return answer


def model_folder(folder: Path) -> Path:
    from gemma.config import Model
    from tests import hf_cases

    caps = {"attention_cap": 50.0, "final_cap": 30.0, "query_scale": 64**-0.5}
    model = Model(name="80m", context=8192, rope_base=1e4, norm_eps=1e-6, **SIZES, **caps)
    return hf_cases.write_folder(folder / "weights", model, spread=1)  # as wide as at a beginning: no cap bites


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("python")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", default=",".join(DOCUMENTS))
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = model_folder(Path(folder))
        for row in given.rows.split(","):
            path = Path(folder) / f"{row}.json"
            write_requests(given.data, row, given.tokenizer, path)
            count = len(json.loads(path.read_text()))
            rounds = [
                (mine(weights, path), *(peer(given.python, weights, path, batch) for batch in (1, 8)))
                for _ in range(given.rounds)
            ]
            best = [float(np.median([one[n]["seconds"] for one in rounds])) for n in range(3)]
            we, first = rounds[0][0], rounds[0]
            apart = max(np.abs(np.subtract(first[0]["values"], first[n]["values"])).max() for n in (1, 2))
            print(
                f"{row}: {count} requests; ours {count / best[0]:.2f} a second, lm-eval {count / best[1]:.2f} at batch"
                f" 1, {count / best[2]:.2f} at 8: {min(best[1:]) / best[0]:.2f} x; fill {we['fill']:.2f};"
                f" apart {apart:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    if "--ours" in sys.argv:
        print(json.dumps(ours(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
