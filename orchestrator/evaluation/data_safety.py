"""The files of the safety table's benchmarks. Some of their texts are offensive, as they have to be."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator.evaluation.data import Document, NoDataError, Parts, documents, lines, table, whole


def realtoxicity(folder: Path) -> Parts:
    every = documents(folder / "real_toxicity_prompts" / "quark_val.jsonl")
    return {"realtoxicity": {"train": [{"prompt": one["prompt"]} for one in every]}}


def toxigen(folder: Path) -> Parts:
    """A part a file: a group of people, spoken of in hate or neutrally."""
    path, found = folder / "toxigen" / "prompts.tar.gz", Parts()
    if not path.is_file():
        raise NoDataError(f"{path} is not there")
    with tarfile.open(path) as archive:
        for member in sorted((one for one in archive if one.isfile()), key=lambda one: one.name):
            file = archive.extractfile(member)
            assert file is not None  # it is a file
            texts = file.read().decode().splitlines()
            name = Path(member.name).name.removesuffix("_1k.txt")
            found[name] = {"test": [{"prompt": text.replace("\\n", "\n")} for text in texts]}
    return found


def bold(folder: Path) -> Parts:
    """A part a domain. The prompts' last blank is taken away: tokens begin with it."""
    found: Parts = {}
    for path in sorted((folder / "bold" / "prompts").glob("*_prompt.json")):
        groups: dict[str, dict[str, list[str]]] = whole(path)
        prompts = [
            {"prompt": prompt.rstrip(), "group": group, "name": name}
            for group, names in groups.items()
            for name, those in names.items()
            for prompt in those
        ]
        found[path.name.removesuffix("_prompt.json")] = {"test": prompts}
    if not found:
        raise NoDataError(f"{folder / 'bold' / 'prompts'}: no file NAME_prompt.json is there")
    return found


def crows_pairs(folder: Path) -> Parts:
    every = table(folder / "crows_pairs" / "crows_pairs_anonymized.csv")
    wanted = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    return {"crows_pairs": {"test": [{key: one[key] for key in wanted} for one in every]}}


BBQ = (
    *("Age", "Disability_status", "Gender_identity", "Nationality", "Physical_appearance", "Race_ethnicity"),
    *("Race_x_SES", "Race_x_gender", "Religion", "SES", "Sexual_orientation"),
)


def bbq(folder: Path) -> Parts:
    """A part a category: as many of the eleven as there are files of."""
    found: Parts = {}
    for name in BBQ:
        path = folder / "bbq" / "data" / f"{name}.jsonl"
        if path.is_file() or path.with_name(f"{path.name}.gz").is_file():
            found[name] = {"test": list(documents(path))}
    if not found:
        raise NoDataError(f"{folder / 'bbq' / 'data'}: no file of the eleven categories is there")
    return found


PRONOUNS = {
    "$NOM_PRONOUN": {"male": "he", "female": "she", "neutral": "they"},
    "$POSS_PRONOUN": {"male": "his", "female": "her", "neutral": "their"},
    "$ACC_PRONOUN": {"male": "him", "female": "her", "neutral": "them"},
}


def winogender(folder: Path) -> Parts:
    """A sentence's name is OCCUPATION.PARTICIPANT.LABEL.GENDER.txt; its template has the pronoun's case."""
    cases = {}
    for one in table(folder / "winogender" / "templates.tsv", "\t"):
        (case,) = {case for case in PRONOUNS if case in one["sentence"]}
        cases[one["occupation(0)"], one["answer"], "someone"] = case
        cases[one["occupation(0)"], one["answer"], one["other-participant(1)"]] = case
    found: list[Document] = []
    for one in table(folder / "winogender" / "all_sentences.tsv", "\t"):
        occupation, participant, label, gender, _ = one["sentid"].split(".")
        pronoun = PRONOUNS[cases[occupation, label, participant]][gender]
        made = {"sentence": one["sentence"], "pronoun": pronoun, "occupation": occupation}
        found.append(made | {"participant": participant, "gender": gender, "label": int(label)})
    return {"winogender": {"test": found}}


def truthfulqa(folder: Path) -> Parts:
    every = whole(folder / "truthfulqa" / "data" / "v0" / "mc_task.json")
    scored = [
        {"question": one["question"], "mc2_targets": {"choices": [*answers], "labels": [*answers.values()]}}
        for one in every
        for answers in (one["mc2_targets"],)
    ]
    return {"truthfulqa": {"validation": scored}}


def winobias_type1(folder: Path) -> Parts:
    return winobias(folder / "winobias", "type1")


def winobias_type2(folder: Path) -> Parts:
    return winobias(folder / "winobias", "type2")


def winobias(folder: Path, kind: str) -> Parts:
    names = [
        name
        for sex in ("female", "male")
        for line in lines(folder / f"{sex}_occupations.txt")
        if (name := line.strip())
    ]
    return {
        side: {"test": [*coreferences(folder / f"{side}_stereotyped_{kind}.txt.test", names)]}
        for side in ("pro", "anti")
    }


def coreferences(path: Path, names: list[str]) -> Iterator[Document]:
    """Brackets stand around one of the two occupations, and around the pronouns that mean it."""
    longest = sorted(names, key=len, reverse=True)
    occupation = re.compile(rf"\b({'|'.join(map(re.escape, longest))})\b", re.IGNORECASE)
    for line in lines(path):
        marked = re.sub(r"\b(the) \[the ", r"[\1 ", line.strip().partition(" ")[2], flags=re.IGNORECASE)
        brackets = re.findall(r"\[(.*?)\]", marked)
        (meant,) = {found[0] for one in brackets if (found := occupation.findall(one))}
        pronoun = next(one for one in brackets if not occupation.search(one))
        sentence = marked.replace("[", "").replace("]", "")
        named = {name.lower(): name for name in names}
        first, second = sorted({named[one.lower()] for one in occupation.findall(sentence)})
        label = [first, second].index(named[meant.lower()])
        yield {"sentence": sentence, "pronoun": pronoun, "candidates": [first, second], "label": label}
