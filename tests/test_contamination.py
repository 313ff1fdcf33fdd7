"""Which questions of a benchmark stand in a text: planted ones are found, others are not."""

import random

from orchestrator.evaluation import contamination
from orchestrator.evaluation.contamination import FEWEST, GRAM, Key

WORDS = [f"word{n}" for n in range(500)]


def sentence(rng: random.Random, count: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(count)]


def questions() -> dict[Key, list[str]]:
    rng = random.Random(1)
    return {("part", number): sentence(rng, count) for number, count in enumerate((40, 20, GRAM, 10, FEWEST, 5))}


def found(texts: list[str]) -> set[int]:
    index = contamination.index_of({key: " ".join(words) for key, words in questions().items()})
    return {number for _, number in contamination.found_in(index, texts)}


def test_planted_questions_are_found_whatever_their_case_and_marks() -> None:
    rng = random.Random(2)
    planted = questions()
    texts = [" ".join(sentence(rng, 300)) for _ in range(20)]
    assert found(texts) == set()
    for number in range(5):
        words = planted["part", number]
        part = words[5 : 5 + GRAM] if len(words) > GRAM + 5 else words
        texts[number] += " " + ", ".join(part).upper() + "! " + " ".join(sentence(rng, 50))
    assert found(texts) == {0, 1, 2, 3, 4}


def test_one_word_fewer_is_not_enough() -> None:
    words = questions()["part", 0]
    assert found([" ".join(words[3 : 3 + GRAM - 1])]) == set()
    assert found([" ".join(words[3 : 3 + GRAM])]) == {0}


def test_a_question_of_few_words_never_counts() -> None:
    assert found([" ".join(questions()["part", 5])]) == set()
