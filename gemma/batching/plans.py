"""What a replica is asked to do in a step, and what it answers: integers down, tokens and scalars up. Plain."""

from dataclasses import dataclass, field

MOST_BIASES = 300  # of `logit_bias`, as OpenAI's API allows
MOST_LOGPROBS = 20  # of `top_logprobs`


@dataclass(frozen=True)
class Sampling:
    """How a sequence's next tokens are chosen. The defaults are those of OpenAI's API, but for the seed."""

    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # of the most likely token's probability
    seed: int = 0  # noise is drawn from it and the token's position, and from nothing else
    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    logprobs: int | None = None  # of each token chosen, and of so many most likely ones; None: of none


@dataclass(frozen=True)
class Limits:
    """The compiled shapes of an engine, and its memory."""

    slots: int  # sequences that decode together
    context: int  # positions of a sequence, at most
    page: int  # positions of a page
    window: int  # of local layers
    global_pages: int  # page 0 of either pool is written to by rows that are not there, and read by none
    local_pages: int
    rows: tuple[int, ...]  # of a decode step: the smallest that holds all that decode
    chunks: tuple[int, ...]  # tokens of a prefill chunk
    scores: bool = True  # whether programs that score are compiled

    @property
    def pages_seen(self) -> int:
        """Pages that a global layer may look at."""
        return pages_for(self.context, self.page)

    def local_pages_seen(self, tokens: int) -> int:
        """Pages that a local layer may look at for a chunk of so many tokens."""
        return min(self.pages_seen, pages_for(self.window - 1 + tokens + self.page - 1, self.page))


def pages_for(positions: int, page: int) -> int:
    return -(-positions // page)


@dataclass(frozen=True)
class Table:
    """Where a sequence's positions lie: the pages of a pool, from its page number `first` on."""

    first: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """Tokens of a sequence whose keys and values are computed, from position `start` on."""

    slot: int
    start: int
    tokens: tuple[int, ...]
    tables: tuple[Table, Table]  # local, global
    sample: bool  # whether the token after them is to be chosen
    targets: tuple[int, ...] = ()  # tokens that are scored, each given all before it
    scores_from: int = 0  # the place in the chunk of the token before the first of them


@dataclass(frozen=True)
class Row:
    """A sequence that decodes: the token before `position` is known on the devices."""

    slot: int
    position: int  # of the token that goes in
    tables: tuple[Table, Table]


@dataclass(frozen=True)
class Admit:
    """A slot begins with another sequence: the places of its seen tokens are cleared."""

    slot: int
    sampling: Sampling
    seen: tuple[int, ...]  # of its prompt, where a repetition penalty asks for it
    counted: tuple[int, ...] = ()  # tokens that it has chosen before it was put back


@dataclass(frozen=True)
class Plan:
    number: int
    admits: tuple[Admit, ...]
    chunks: tuple[Chunk, ...]
    rows: tuple[Row, ...]
    steps: int  # decode steps, one after the other; chunks go before them

    @property
    def empty(self) -> bool:
        return not self.chunks and not self.rows


@dataclass(frozen=True)
class Chosen:
    """Tokens chosen for a slot in a plan, in order."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()  # of the model, before penalties and temperature
    top: tuple[tuple[tuple[int, float], ...], ...] = ()  # of each token, the most likely ones


@dataclass(frozen=True)
class Scored:
    """Of a chunk's targets: the log-probability of each, and whether it is the most likely token."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]


@dataclass(frozen=True)
class Answer:
    number: int
    chosen: dict[int, Chosen] = field(default_factory=dict)  # by slot
    scored: dict[int, Scored] = field(default_factory=dict)  # by slot
    seconds: float = 0.0
