"""The offline data set of texts: `topics`, utterances of the English chatterbot-corpus, as a manifest in the cache."""

from __future__ import annotations

import collections
import csv
import hashlib
import pathlib

from models import GraftError
from models.offline import DATA, cache_folder, fetch, whole_or_nothing

LEAST_UTTERANCES = 40  # of a topic; smaller ones are left out
MOST_UTTERANCES = 200  # of a topic, those with the lowest hashes
SMALL_TALK = "conversations"  # a topic of the corpus that is about nothing
TOPICS_VERSION = 2  # in the cache's folder name: raise it when anything below makes another table


def text_data_file(name: str) -> pathlib.Path:
    """The data set `topics` as a CSV file with the columns text, label and conversation, the same on every machine.

    Made in the cache on first use, safe as `models.offline.fetch` is. `conversation` is the one in which an utterance
    comes first: a question and its answer share words, so that figures are some points higher where they straddle
    splits than with `--group-column conversation`.

    Raises:
        GraftError: an unknown name, and all that `models.offline.fetch` raises.
    """
    known = [name for name, item in DATA.items() if item["kind"] == "text"]
    if name not in known:
        raise GraftError(f"{name}: no text data set by this name; there are {', '.join(known)}")
    folder = cache_folder() / "data" / f"{name}-{TOPICS_VERSION}-{DATA[name]['sha256'][:12]}"
    if not folder.is_dir():
        rows = _topics(fetch(name))
        with whole_or_nothing(folder) as made, (made / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("text", "label", "conversation"), *rows])
    return folder / f"{name}.csv"


def _topics(folder: pathlib.Path) -> list[tuple[str, str, str]]:
    """(utterance, topic, conversation) by topic and hash, from the corpus' YAML files, one for each topic.

    Blanks and line breaks, which the files wrap long lines with, become one blank. What is said in several topics
    ("Yes.") is left out.
    """
    import yaml

    first_said = {}  # topic -> {utterance: number of its first conversation}
    for file in sorted(folder.glob("*.yml")):
        conversations = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        said = first_said[file.stem] = {}
        for number, conversation in enumerate(conversations):
            for utterance in conversation:
                said.setdefault(" ".join(str(utterance).split()), number)
        said.pop("", None)
    topics = {
        topic: said for topic, said in first_said.items() if topic != SMALL_TALK and len(said) >= LEAST_UTTERANCES
    }
    topics_of = collections.Counter(utterance for said in topics.values() for utterance in said)
    rows = []
    for topic, said in topics.items():
        own = sorted((u for u in said if topics_of[u] == 1), key=lambda u: hashlib.sha256(u.encode()).hexdigest())
        rows += [(utterance, topic, f"{topic} {said[utterance]}") for utterance in own[:MOST_UTTERANCES]]
    return rows
