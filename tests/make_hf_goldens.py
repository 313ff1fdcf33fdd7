"""python -m tests.make_hf_goldens: writes tests/hf_goldens.npz and tests/chat_goldens.json by torch and transformers.

The logits and gradients of Hugging Face's own Gemma2ForCausalLM (float32, eager attention), made with torch 2.13.0 and
transformers 5.23.0; to be made again only when the cases change.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma.config import Model
from tests import hf_cases

# Released with gemma-2-2b-it (tokenizer_config.json, chat_template).
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
CONVERSATIONS = [
    [("user", "What is 2+2?")],
    [("user", "  Hi \n"), ("assistant", "\tHello, you.\n\nWell?  "), ("user", "äöü 🙂 <b>")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d\ne")],
]


def logits_and_gradients(
    model: Model, tensors: dict[str, np.ndarray], tokens_BU: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """logits_BTV, and the gradient of the mean cross-entropy of tokens 1..T for every tensor."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config.from_dict(hf_cases.config_json(model))
    theirs = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    missing, extra = theirs.load_state_dict(state, strict=False)
    assert (missing, extra) == (["lm_head.weight"], [])  # tied
    theirs.tie_weights()
    logits = theirs(torch.from_numpy(tokens_BU[:, :-1])).logits
    target = torch.from_numpy(tokens_BU[:, 1:])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    return logits.detach().numpy(), gradients


def chats() -> list[dict[str, Any]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    out = []
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        for prompt in (False, True):
            rendered, _ = render_jinja_template(
                [messages], chat_template=TEMPLATE, add_generation_prompt=prompt, bos_token="<bos>"
            )
            out.append({"messages": messages, "prompt": prompt, "text": rendered[0]})
    return out


def main() -> None:
    goldens: dict[str, np.ndarray] = {}
    for case, model in hf_cases.CASES.items():
        logits_BTV, gradients = logits_and_gradients(model, hf_cases.tensors(model), hf_cases.tokens(model))
        goldens[f"{case}/logits"] = logits_BTV
        goldens |= {f"{case}/{name}": hf_cases.probes(name, g) for name, g in gradients.items()}
    np.savez_compressed(hf_cases.GOLDENS, **goldens)
    text = json.dumps(chats(), indent=1, ensure_ascii=False)
    (Path(__file__).parent / "chat_goldens.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
