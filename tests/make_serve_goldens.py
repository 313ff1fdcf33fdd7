"""python -m tests.make_serve_goldens: writes tests/serve_goldens.json by torch and transformers.

What Hugging Face's Gemma2ForCausalLM generates (float32, eager attention, greedy), and its log-odds of Yes against No
for ShieldGemma's questions; made with torch 2.13.0 and transformers 5.24.0.
"""

import json
from typing import Any

from gemma.config import Model
from gemma.text import shieldgemma
from gemma.text.chat import plain
from gemma.text.tokenizer import ByteTokenizer
from tests import hf_cases


def theirs(model: Model) -> Any:
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config.from_dict(hf_cases.config_json(model))
    made = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    state = {name: torch.from_numpy(array) for name, array in hf_cases.tensors(model).items()}
    missing, extra = made.load_state_dict(state, strict=False)
    assert (missing, extra) == (["lm_head.weight"], [])  # tied
    made.tie_weights()
    return made


def generated(model: Model) -> list[list[int]]:
    """NEW_TOKENS after each prompt; no token ends it."""
    import torch

    made, found = theirs(model), []
    for prompt in hf_cases.prompts(model):
        ids = torch.tensor([prompt])
        out = made.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=hf_cases.NEW_TOKENS,
            min_new_tokens=hf_cases.NEW_TOKENS,
            eos_token_id=model.vocab + 1,
            pad_token_id=0,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def log_odds() -> list[dict[str, float]]:
    import torch

    coder, made = ByteTokenizer(), theirs(hf_cases.JUDGE)
    yes, no = shieldgemma.answers(coder)
    found = []
    for question, answer in hf_cases.QUESTIONS:
        told = plain(answer, coder) if answer is not None else None
        odds = {}
        for policy in shieldgemma.POLICIES:
            ids = shieldgemma.tokens(coder, policy, plain(question, coder), told)
            with torch.no_grad():
                logits_V = made(torch.tensor([ids])).logits[0, -1]
            odds[policy] = float(logits_V[yes] - logits_V[no])
        found.append(odds)
    return found


def main() -> None:
    goldens = {"generated": {case: generated(model) for case, model in hf_cases.CASES.items()}, "log_odds": log_odds()}
    hf_cases.SERVE_GOLDENS.write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
    main()
