"""What a step costs, from the config alone.

B batch, T time, D width, N query heads, K kv heads, H head size, F hidden, V vocabulary, L layers.
"""

from gemma.config import Model


def parameters(model: Model) -> tuple[int, int]:
    """Parameters of the embedding, and all others. Table 2 of the report counts them the same way."""
    D, H, F = model.width, model.head_size, model.hidden
    block = 2 * D * H * (model.heads + model.kv_heads) + 3 * D * F + 4 * D
    return model.vocab * D, model.layers * block + D


def keys_seen(sequence: int, window: int | None) -> int:
    """Sum over queries of the keys each may see: T(T+1)/2 where there is no window, else the band below it."""
    w = sequence if window is None else min(window, sequence)
    return w * (w + 1) // 2 + (sequence - w) * w


def block_pairs(sequence: int, queries: int, keys: int, window: int | None) -> int:
    """(query, key) pairs in the blocks of queries x keys that a flash kernel visits: all those with a pair that the
    mask leaves.
    """
    w = sequence if window is None else window
    visited = 0
    for first_query in range(0, sequence, queries):
        last_query = first_query + queries - 1
        visited += sum(k <= last_query and first_query - (k + keys - 1) < w for k in range(0, sequence, keys))
    return queries * keys * visited


def step_flops(model: Model, batch: int, sequence: int) -> int:
    """Model FLOPs of one training step: 2 per multiply-add, backward twice the forward, nothing for rematerialisation.

    Attention counts only the (query, key) pairs that the causal mask and the window leave; masked-out work is not
    useful work. The embedding counts once, as the output projection. PaLM (arXiv:2204.02311, appendix B), but for
    the mask.
    """
    D, N, K, H, F = model.width, model.heads, model.kv_heads, model.head_size, model.hidden
    per_token = model.layers * (D * (2 * N + 2 * K) * H + 3 * D * F) + D * model.vocab
    pairs = model.layers // 2 * (keys_seen(sequence, model.window) + keys_seen(sequence, None))
    forward = 2 * (sequence * per_token + 2 * pairs * N * H)
    return 3 * batch * forward
